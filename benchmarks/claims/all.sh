#!/bin/sh
# Every claim at pocket size: data, runs, results, tables. About a day of one core; a run that was
# killed goes on where it was.
#     sh benchmarks/claims/all.sh DATA
set -eu
data=$1
made=runs/data
here=benchmarks/claims

python $here/data.py "$data" $made
python $here/stories260k.py "$data/stories260k" $made/stories260k

# claim NAME RECIPE SETTING...   runs it and puts its result into benchmarks/results
claim() {
    name=$1 recipe=$2
    shift 2
    foretune run $here/"$recipe".yaml "$@" --out runs/claims/"$name" --resume
    python benchmarks/publish.py runs/claims/"$name" claims-"$name"
}

claim har har tasks.source=$made/har.npz
claim omniglot-pairs omniglot-pairs tasks.source=$made/omniglot-pairs.npz
claim mnist-pairs mnist-pairs tasks.source=$made/mnist-pairs.npz
claim clinc150 clinc150 tasks.source="$data/clinc150/clinc150.jsonl.gz"
claim shakespeare shakespeare tasks.source="$data/shakespeare/speakers.jsonl.gz"
claim python-docs python-docs
claim convai2 convai2 tasks.source="$data/convai2/valid.jsonl.gz"

# The others are results of their own, not collections, and so not called claims-.
# alone NAME RECIPE SETTING...
alone() {
    name=$1 recipe=$2
    shift 2
    foretune run $here/"$recipe".yaml "$@" --out runs/claims/"$name" --resume
    python benchmarks/publish.py runs/claims/"$name" "$name"
}

# What the rate of retraining is worth.
alone rates-clinc150 clinc150 tasks.source="$data/clinc150/clinc150.jsonl.gz" \
    'retrain.methods=[{standard: {learning_rate: 2e-4, as: standard-2e-4}},
      {standard: {learning_rate: 6e-4, as: standard-6e-4}}, {standard: {learning_rate: 2e-3}},
      {standard: {interpolate: 0.5, learning_rate: 6e-4, as: half-6e-4}},
      {standard: {interpolate: 0.5, learning_rate: 2e-3, as: half-2e-3}}]'

alone spectrum-clinc150 clinc150 tasks.source="$data/clinc150/clinc150.jsonl.gz" tasks.rotate=false \
    seeds=1 retrain.learning_rate=6e-4 'adapt.shots=[5]' \
    'spectrum={shots: 5, ranks: [1, 2, 4, 8, 16, 32]}' \
    'retrain.methods=[none, standard, {peft-ml: {form: last-layer, as: peft-ml-last-layer}}, peft-ml]'

# Ranks in retraining by ranks in adapting: the spectrum is the grid.
alone convai2-ranks convai2 tasks.source="$data/convai2/valid.jsonl.gz" 'adapt.shots=[40]' \
    'spectrum={shots: 40, ranks: [1, 4, 8, 16]}' \
    'retrain.methods=[none, standard, {peft-ml: {lora: {r: 1, lora_alpha: 2}, as: peft-ml-1}},
      {peft-ml: {lora: {r: 4, lora_alpha: 8}, as: peft-ml-4}}, peft-ml,
      {peft-ml: {lora: {r: 16, lora_alpha: 32}, as: peft-ml-16}},
      {peft-ml: {form: last-layer, as: peft-ml-last-layer}}]'

# SaRA's entries as the adapters of PEFT-ML.
alone sparse-convai2 sparse-convai2 tasks.source="$data/convai2/valid.jsonl.gz"
