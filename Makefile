# Everything runs from a fresh clone; `setup` installs what is missing and is quick when nothing is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export REDIS_MIGRATION_CACHE ?= $(CURDIR)/.cache
target := $(or $(CARGO_TARGET_DIR),target)
# Passed on as they are: make bench BENCH='--runs 1 --scale 0.1'
BENCH ?=
CHAOS ?= --runs 200
# With these the plans are the first ones of CHAOS as it stands above: only the guards are off.
MUTANT ?= --runs 20

.PHONY: help setup test fmt lint deny unit e2e demo bench chaos
help: ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## /\1\t/p' Makefile | expand -t 8

setup: ## install the servers that tests, demo and bench run against
	@bash e2e/setup.sh --deny

# What is fetched and built in another language needs the cores that Rust leaves idle, and the other way round.
test: ## everything that a change must pass
	$(MAKE) --no-print-directory fmt
	$(MAKE) --no-print-directory -j2 setup lint
	$(MAKE) --no-print-directory deny
	$(MAKE) --no-print-directory unit
	$(MAKE) --no-print-directory e2e

fmt:
	cargo fmt --all --check

lint:
	cargo clippy --locked --workspace --all-targets -- -D warnings

deny: setup ## licences, banned and doubled crates, sources
	cargo fetch --locked --quiet
	"$(REDIS_MIGRATION_CACHE)/bin/cargo-deny" --offline --locked --workspace check --hide-inclusion-graph bans licenses sources

# Always the whole workspace: with one package alone, dependencies are built a second time with other features.
unit: ## unit and property tests
	cargo test --locked --workspace --lib --bins

# Most tests wait for something most of the time.
e2e: setup ## integration tests against real servers
	cargo build --locked --workspace
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$$((2 * $$(nproc)))} cargo test --locked --workspace --test "*"

demo: setup ## a live migration to look at: standalone Redis to a 3-node cluster
	cargo build --locked --release --workspace
	REDIS_MIGRATION_BIN="$(target)/release/redis-migration" "$(target)/release/demo"

bench: setup ## the figures, beside the limits measured in the same run
	cargo build --locked --release --workspace
	REDIS_MIGRATION_BIN="$(target)/release/redis-migration" "$(target)/release/bench" $(BENCH)

chaos: setup ## faults of all kinds while a client writes; then with the guards off, which must show
	cargo build --locked --release --workspace
	REDIS_MIGRATION_BIN="$(target)/release/redis-migration" "$(target)/release/chaos" $(CHAOS)
	REDIS_MIGRATION_BIN="$(target)/release/redis-migration" "$(target)/release/chaos" --mutant $(MUTANT)
