#!/usr/bin/env bash
# The proof on a GPU, in twelve minutes at most: tests, the default, slices, timings, the large network, in this order.
#     benchmarks/gpu.sh DATA OUT                          # a bare machine with Python and a driver will do
#     benchmarks/gpu.sh DATA OUT --device cpu --tiny      # a dry run of the whole, in tiny form
#     WHEELS=DIR PYTHON=python3.12 benchmarks/gpu.sh ...  # install from a folder of wheels, by this Python
# What is cut off leaves the rest: OUT/stages.csv, logs, runs (pictures; log.csv as it grows), results/*.json. Of these the
# runs go to benchmarks/results/gpu, speed_cuda.json to results/speed; then `python benchmarks/table.py --write`.
set -u
data=$(realpath "$1") out=$(realpath -m "$2") device=cuda tiny=""
case " $* " in *" --device cpu "*) device=cpu ;; esac
case " $* " in *" --tiny "*) tiny="--width 2 --epochs 1 --limit-batches 2 --workers 0" ;; esac
cd "$(dirname "$0")/.." && mkdir -p "$out/logs"
deadline=$((SECONDS + 720)) python=${PYTHON:-python3}
stage() {  # NAME, the seconds that it may take, its command
    local begun=$SECONDS left=$((deadline - SECONDS))
    [ $left -gt 5 ] || return
    timeout -k 5 $(($2 < left ? $2 : left)) "${@:3}" > "$out/logs/$1.log" 2>&1
    echo "$1,$((SECONDS - begun)) s,exit code $?" | tee -a "$out/stages.csv"
}
record() {  # NAME, seconds, arguments of train.py; those of --tiny last, for the last word counts
    stage "$1" "$2" "$python" benchmarks/record.py "$out/results/$1_seed0" --data "$data" --device $device \
        --cache "$out/cache" --out "$out/runs/$1" --tensorboard "$out/logs" "${@:3}" $tiny
}
if ! "$python" -c "import monai, lightning, psutil, pytest, train; train.data.import_imgaug()"; then
    stage venv 60 "$python" -m venv "$out/venv" && python=$out/venv/bin/python
    stage install 400 "$python" -m pip install ${WHEELS:+--no-index --find-links "$WHEELS"} -r requirements.txt \
        pytest lightning monai psutil
fi
stage tests 200 "$python" -m pytest -v -rP tests/test_gpu.py
record default 240
record slices 180 --dims 2
speed=("$python" benchmarks/speed.py --device $device ${tiny:+--quick} --results "$out/results")
stage speed 75 "${speed[@]}" --repeats 3 --rows step data prediction
stage engines 150 "${speed[@]}" --repeats 1 --rows engines
record large 720 --width 32 --epochs 18
