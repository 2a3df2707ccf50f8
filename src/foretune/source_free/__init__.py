"""Source-free adaptation of time-series classifiers: subspace SFDA. A wing."""

MODEL_FILE = "sfda.json"  # marks a folder as a prepared model: the form of its weights
# In the folder of an adapted state: its record, which marks the folder, and the tensors.
STATE_FILE, STATE_WEIGHTS_FILE = "core.json", "core.safetensors"
