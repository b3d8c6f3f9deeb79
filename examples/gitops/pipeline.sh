#!/usr/bin/env bash
# One migration in a pipeline: apply it, wait until the target is in sync and verified, approve, wait
# for the end. Ends with 0 only when the target has taken over.
#
#   pipeline.sh orders.yaml orders shop
set -euo pipefail
manifest=$1 name=$2 namespace=${3:-default}
in_sync_within=${IN_SYNC_WITHIN:-6h} finished_within=${FINISHED_WITHIN:-15m}
migration=(kubectl -n "$namespace")

# Whatever comes first: `kubectl wait` for one condition would wait in vain after a failure.
wait_for() { # condition timeout
    "${migration[@]}" wait "redismigration/$name" --for="condition=$1" --timeout="$2" &
    local awaited=$!
    "${migration[@]}" wait "redismigration/$name" --for=condition=Finished --timeout="$2" >/dev/null 2>&1 &
    local finished=$!
    wait -n "$awaited" "$finished" || true
    kill "$finished" 2>/dev/null || true
    if kill -0 "$awaited" 2>/dev/null; then
        # Finished, so what is awaited is there by now or never comes.
        kill "$awaited" 2>/dev/null || true
        "${migration[@]}" wait "redismigration/$name" --for="condition=$1" --timeout=1s
    else
        wait "$awaited"
    fi
}

tell() {
    "${migration[@]}" get redismigration "$name" -o wide >&2 || true
    "${migration[@]}" get redismigration "$name" \
        -o jsonpath='{range .status.conditions[*]}{.type}={.status} {.reason}: {.message}{"\n"}{end}' >&2 || true
}
trap 'code=$?; [ "$code" = 0 ] || tell' EXIT

"${migration[@]}" apply -f "$manifest"
wait_for CutoverReady "$in_sync_within"
"${migration[@]}" patch "redismigration/$name" --type=merge -p '{"spec":{"cutover":{"approved":true}}}'
wait_for Succeeded "$finished_within"
tell
