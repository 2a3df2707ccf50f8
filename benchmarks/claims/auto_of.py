"""`[{auto: {candidates: [...]}}]` for a recipe's methods, as a setting of `foretune run`.

    foretune run X.yaml "retrain.methods=$(python benchmarks/claims/auto_of.py X.yaml)"

`auto` runs apart from the methods that it chooses among, because both take long. With the same seed
its base is the same bits as the one that the chosen method makes by itself.
"""

import json
import sys
from pathlib import Path

from foretune.recipes.yaml_io import parse_yaml

if __name__ == "__main__":
    path = Path(sys.argv[1])
    recipe = parse_yaml(path.read_text("utf-8"), str(path))
    print(json.dumps([{"auto": {"candidates": recipe["retrain"]["methods"]}}]))
