#!/bin/sh
# The evidence: data, runs, results. A run that was killed goes on where it was.
#     sh benchmarks/evidence/all.sh DATA [COLLECTION...]     without names: all of them
set -eu
data=$1
shift
made=runs/data
here=benchmarks/evidence
wanted=${*:-}

python $here/data.py "$data" $made

# collection NAME SETTING...   runs it and puts its result into benchmarks/results
collection() {
    name=$1
    shift
    case " ${wanted:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    foretune run $here/tower.yaml name="$name" "$@" --out runs/evidence/"$name" --resume
    python benchmarks/publish.py runs/evidence/"$name" evidence-"$name"
}

opinions() {
    name=$1
    shift
    collection "$name" tasks.source="$data/opinions/$name.jsonl.gz" model.name=minilm "$@"
}

opinions land-bank tasks.unseen=94
collection senate-117 tasks.source=$made/senate-117.npz tasks.unseen=33
collection senate-100 tasks.source=$made/senate-100.npz tasks.unseen=33
collection uber-taiwan tasks.source=$made/uber-taiwan.npz tasks.unseen=150
collection toxcast tasks.source=$made/toxcast.npz tasks.unseen=60
opinions taxes tasks.unseen=86
opinions biodiversity tasks.unseen=99
opinions housing tasks.unseen=68
collection senate-95 tasks.source=$made/senate-95.npz tasks.unseen=33
collection senate-103 tasks.source=$made/senate-103.npz tasks.unseen=33
collection senate-108 tasks.source=$made/senate-108.npz tasks.unseen=33
collection har tasks.source=$made/har.npz tasks.unseen=6
collection omniglot-pairs tasks.source=$made/omniglot-pairs.npz tasks.unseen=20
