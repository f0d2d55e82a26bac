# Every check is one word here, and CI runs the same word. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The lab makes network namespaces, which needs root: without it, test programs and the demo run through sudo.
ifneq ($(shell id -u),0)
  AS_ROOT := sudo --preserve-env=PATH,HOME,RUST_LOG,CI
  export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER := sudo --preserve-env
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER := sudo --preserve-env
endif

QUICK ?=
SEEDS ?= 10000
SEED ?= 1
MUTATE ?=
FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard tests/fuzz/fuzz_targets/*.rs)))

.PHONY: help setup demo build test test-fast test-lanes lint deny bench chaos soak sim differential fuzz clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

setup: ## install what building and the demo need and this machine lacks
	@deploy/setup.sh build

demo: setup ## the appliance on this one machine: clients, two balancers, a witness, servers; a kill, a failover
	cargo build --release --package komainu-node
	$(AS_ROOT) target/release/komainu demo $(ARGS)

build: setup ## the release binary, target/release/komainu
	cargo build --release --package komainu-node

test: ## every test: unit, property, and the real binary in network namespaces (needs root or sudo)
	@deploy/setup.sh test
	@# The binary with the features of its tests' dependencies: by itself it would take a third of the tree twice.
	cargo build --workspace --bins --tests
	SEEDS=$(SEEDS) cargo test --workspace --no-fail-fast

# Those that name their lane are run on every lane by `make test` already.
test-lanes: ## the system tests that `make test` runs on the chosen lane only, on the other lanes
	@deploy/setup.sh test
	cargo build --package komainu-node
	@set -e; for lane in af_packet xdp; do \
	    echo "== $$lane"; \
	    KOMAINU_TEST_LANE=$$lane cargo test --package komainu-tests --test system -- \
	      --skip af_packet:: --skip tc:: --skip xdp:: --skip kernel:: --skip demo::; \
	done

test-fast: setup ## the tests that need neither root nor the binary
	cargo test --workspace --exclude komainu-tests

lint: setup ## formatting, clippy without a warning, and cargo-deny where it is installed
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --package komainu-cluster --features sim --bins -- -D warnings
	@if command -v cargo-deny >/dev/null 2>&1; then cargo deny check bans licenses sources; \
	else echo "lint: cargo-deny is not installed, licences not checked: cargo install --locked cargo-deny"; fi

deny: ## licences, sources, and known vulnerabilities (needs cargo-deny and its advisory database)
	cargo deny check

bench: ## throughput beside the kernel's own forwarding; QUICK=1 for two minutes; writes target/bench/results.json
	@deploy/setup.sh bench
	cargo build --release --package komainu-tests --bin bench
	$(AS_ROOT) target/release/bench $(if $(QUICK),--quick) $(ARGS)

chaos: ## machines, cables, memory and disks fail, beside keepalived; CASES=… ROUNDS=N LANES=… CLUSTERS=… PROFILE=… PEERS=… ARGS=--missing|--docs; adds to target/chaos/results.json
	@deploy/setup.sh chaos
	cargo build --release --package komainu-node
	cargo build --release --package komainu-tests --bin chaos
	$(AS_ROOT) target/release/chaos $(if $(CASES),--cases $(CASES)) $(if $(ROUNDS),--rounds $(ROUNDS)) \
	    $(if $(LANES),--lanes $(LANES)) $(if $(CLUSTERS),--clusters $(CLUSTERS)) $(if $(PROFILE),--profile $(PROFILE)) \
	    $(if $(PEERS),--peers $(PEERS)) $(ARGS)

soak: ## a cluster under load for MINUTES (10), every processor busy with other work: the owner stays, nothing breaks or grows; PROFILE=… LANE=… CLUSTER=…
	@deploy/setup.sh test
	cargo build --release --package komainu-node
	cargo build --release --package komainu-tests --bin soak
	$(AS_ROOT) target/release/soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(PROFILE),--profile $(PROFILE)) \
	    $(if $(LANE),--lane $(LANE)) $(if $(CLUSTER),--cluster $(CLUSTER)) $(ARGS)

sim: setup ## SEEDS (10000) simulated runs from SEED (1); MUTATE=1 also breaks each rule in turn, which must be found
	cargo run --release --package komainu-cluster --features sim --bin sim -- \
	  --seeds $(SEEDS) --first $(SEED) $(if $(MUTATE),--mutate) $(ARGS)

differential: setup ## CASES (1000000) random frames at each hook into the kernel's program and the engine: same verdict, bytes, counters
	KOMAINU_CASES=$(or $(CASES),1000000) cargo test --package komainu-tests --test differential -- --nocapture

fuzz: setup ## every fuzz target for FUZZ_SECONDS (600) each; needs a nightly toolchain
	@rustup toolchain list | grep -q '^nightly' || { echo "fuzz: needs a nightly compiler: rustup toolchain install nightly"; exit 1; }
	@cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	@set -e; for target in $(FUZZ_TARGETS); do \
	    echo "== $$target: $(FUZZ_SECONDS) s"; \
	    cargo +nightly fuzz run --fuzz-dir tests/fuzz $$target -- -max_total_time=$(FUZZ_SECONDS) -verbosity=0 -print_final_stats=1; \
	done

clean: ## remove everything built
	cargo clean
