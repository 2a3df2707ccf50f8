"""What foretune does with an architecture: each check says "works", or why it is refused.

A result that is neither, which is a wrong number or an error of another kind, fails an assertion.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import foretune
import tiny_models
from architectures.catalogue import Architecture
