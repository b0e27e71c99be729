#!/usr/bin/env bash
# What only a GPU can show. Figures and logs go to a folder.
#
#     bash benchmarks/gpu.sh FOLDER [PART ...]
#
# The parts take at most: medium 4 minutes, evaluation 2, flux 2, compiled 4, tests 3, checks 4.
set -u
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
out="$1"
mkdir -p "$out"

run() { # NAME SECONDS COMMAND ...
    timeout --signal=INT --kill-after=10 "$2" "${@:3}" 2>&1 | tee "$out/$1.log" | tail -n 30
    echo "== $1: status ${PIPESTATUS[0]} after $SECONDS s in all"
}

medium() {
    run medium 240 python benchmarks/gpu.py --output "$out/medium.json" --rows \
        medium "medium, null branch off" "medium, recomputed" "medium, xformers" \
        "medium, int8" "medium, nf4"
}

evaluation() { # a whole run with evaluations of 258 pictures
    run evaluation 120 python benchmarks/whole_run.py tiny/flow_grpo.yaml \
        model.name=benchmarks/architectures.py:RandomSD35Medium model.path=random/sd3.5-medium \
        model.dtype=bfloat16 model.height=512 model.width=512 model.max_sequence_length=128 \
        train.steps=2 train.prompts_per_step=2 train.images_per_prompt=4 train.images_per_pass=8 \
        train.ema.decay=0 train.evaluate_every=0 sampler.steps=4 sampler.guidance=4.5 \
        evaluation.images_per_prompt=6 evaluation.guidance_sweep=[] sampler.window.size=0 \
        'rewards={brightness: 1.0}' 'evaluation.rewards={brightness: 1.0}' \
        --output "$out/evaluation.json"
}

flux() {
    run flux 120 python benchmarks/gpu.py --output "$out/flux.json" --repetitions 1 --rows \
        flux "flux, nf4, recomputed" "flux, recomputed"
}

compiled() {
    run compiled 240 python benchmarks/gpu.py --output "$out/compiled.json" --rows \
        "medium, compiled" "medium, compiled, null branch off"
}

tests() {
    run tests 180 python -m pytest -q -n 8 -p no:cacheprovider -m "not slow" \
        tests/objectives tests/training tests/models tests/test_policy.py
}

checks() { # ratios before the first update, in passes of two sizes; attention back ends
    for settings in model.dtype=float32 model.dtype=bfloat16 model.dtype=float16 \
        "model.dtype=bfloat16 model.attention=xformers"; do
        # The settings are several words.
        run "check-${settings//[ =]/-}" 60 \
            python -c 'from flowalign.cli import run; run()' check tiny/flow_grpo.yaml $settings
    done
}

python -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
for part in "${@:2}"; do "$part"; done
