#!/usr/bin/env bash
# Runs one config on all hosts of a TPU pod slice, and goes on after a stop.
#
#   bash docs/clusters/tpu-pod.sh
#
# Replace the words in capitals.  The config, the data and the package must be on every host
# (`setup` below), and SHARED is a disk that all hosts have mounted under the same name (Filestore).
# Not run on a TPU pod yet; see README.md beside this file.
set -uo pipefail

NAME=TPU_NAME
ZONE=TPU_ZONE
REPOSITORY=GIT_URL
SHARED=/SHARED

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

setup() {
    on_all_hosts "test -d robust-ssl || git clone $REPOSITORY robust-ssl
        python3 -m venv venv && venv/bin/pip install --quiet ./robust-ssl 'jax[tpu]'"
}

# Every host must print the same total; see README.md.
check() {
    on_all_hosts "venv/bin/python -c '
import jax
jax.distributed.initialize()
print(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count())'"
}

run() {
    on_all_hosts "cd robust-ssl && ../venv/bin/robust-ssl run \
        --config=configs/gen_af.py:downstream=gtsrb32 \
        --workdir=$SHARED/runs/gtsrb --cache-dir=$SHARED/cache/xla \
        --distributed --no-progress; echo ended with \$?" 2>&1 | tee run.txt
}

setup && check || exit 1
# 75: stopped and resumable.  A slice that was taken away must be created again first.
while run; grep --quiet '^ended with 75' run.txt; do sleep 60; done
# A host that was lost says nothing, and that is no success either.
grep --quiet '^ended with' run.txt || exit 1
! grep '^ended with' run.txt | grep --quiet --invert-match 'with 0$'
