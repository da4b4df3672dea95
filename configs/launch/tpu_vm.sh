#!/usr/bin/env bash
# A model over all hosts of a Cloud TPU slice: the same command on each, and `auto` finds the rest.
#
#   TPU=my-v5e-16 ZONE=us-west4-a MODEL=hf:org/name bash configs/launch/tpu_vm.sh
#
# Before, once on all workers: pip install ".[tpu]" in a checkout of this repository, and whatever the model needs to be
# found there (each worker reads all of it). The text comes from worker 0. The workers must reach each other on any port,
# as they do in a network with the default rules. Where one fails, all end with the reason and exit code 2.
set -euo pipefail

gcloud compute tpus tpu-vm ssh "${TPU:?the name of the slice}" --zone="${ZONE:?its zone}" --worker=all \
  --command="jaxopt-llm generate --coordinator=auto --mesh=tensor=${CHIPS:-16} --dtype=bfloat16 \
    --model=${MODEL:?a model} --prompt='${PROMPT:-Why is the sky blue?}' --chat --max_tokens=128"
