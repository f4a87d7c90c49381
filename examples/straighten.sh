#!/bin/sh
# From a diffusion model to a one-step model: pairs, reflow, pairs of the result, distill, export.
#
#     sh examples/straighten.sh [OUT]
#
# A toy length, to see every part at work in ten minutes of processor time; how good the
# student is depends on pairs and steps that are not spent here. Kill it whenever you like and run
# it again: every command goes on where it stopped, and a finished one has nothing to do. For your
# own model set MODEL, PROMPTS (a file with a prompt on each line), NUM and CONFIG; PAIR_OPTIONS are
# for both commands that make pairs, such as "--batch-size 32 --dtype bfloat16".
set -eu

OUT=${1:-runs/straighten}
MODEL=${MODEL:-emoji-sd}
PROMPTS=${PROMPTS:-emoji:128}
NUM=${NUM:-128}
CONFIG=${CONFIG:-toy}
GUIDANCE=${GUIDANCE:-5}
REFLOWED_GUIDANCE=${REFLOWED_GUIDANCE:-1}
PAIR_OPTIONS=${PAIR_OPTIONS:-}
RECTIFLOW=${RECTIFLOW:-rectiflow}

# 1. What the teacher makes of noise: 25 steps of DPM-Solver++ under guidance.
$RECTIFLOW pairs --model "$MODEL" --prompts "$PROMPTS" --num "$NUM" --out "$OUT/pairs-1" \
  --solver dpmpp --steps 25 --guidance "$GUIDANCE" $PAIR_OPTIONS

# 2. The 2-rectified flow.
$RECTIFLOW reflow --model "$MODEL" --pairs "$OUT/pairs-1" --config "$CONFIG" -o "$OUT/reflow" \
  --export "$OUT/2rf"

# 3. What it makes of noise, nearly straight. The guidance is in its pairs already; the paper takes 1.5.
$RECTIFLOW pairs --model "$OUT/2rf" --prompts "$PROMPTS" --num "$NUM" --out "$OUT/pairs-2" \
  --solver euler --steps 8 --guidance "$REFLOWED_GUIDANCE" $PAIR_OPTIONS

# 4. Distilled into one step.
$RECTIFLOW distill --model "$OUT/2rf" --pairs "$OUT/pairs-2" --config "$CONFIG" -o "$OUT/distill"

# 5. A folder for stock diffusers.
$RECTIFLOW export "$OUT/distill" -o "$OUT/one-step"
