# Two commands do everything on a machine with Rust: `make demo` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# Servers written by others, for the conformance tests of stores; they are built with Go. Without it these tests say that
# they are skipped.
SERVERS = if command -v go >/dev/null; then \
	FOREBAY_VERSITYGW="$$(scripts/versitygw.sh)"; FOREBAY_RCLONE="$$(scripts/rclone.sh)"; \
	export FOREBAY_VERSITYGW FOREBAY_RCLONE; \
	else echo "no Go: versitygw and rclone are not built" >&2; fi

# Arguments of the benchmark, as in: make bench BENCH="--rows walk random --scale 0.1"
BENCH ?=

.PHONY: help demo bench bench-policies build test lint generate fuzz e2e cluster cluster-down nightly deps clean

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: deps ## Serve a data set from an embedded S3 store through workers and a FUSE mount; kill things; print a table
	cargo build --release --package forebay --package forebay-demo
	./target/release/forebay-demo --forebay ./target/release/forebay

bench: deps ## As root: compare reads through a mount with local files and with rclone; print ratios; target/bench.json
	cargo build --release --package forebay --package forebay-bench
	rclone="$$(scripts/rclone.sh)" || rclone=; \
	./target/release/forebay-bench --forebay ./target/release/forebay $${rclone:+--rclone "$$rclone"} $(BENCH)

bench-policies: deps ## As root: hit ratios of the eviction policies against the best possible; target/bench-policies.json
	cargo build --release --package forebay --package forebay-bench
	./target/release/forebay-bench --forebay ./target/release/forebay --policies $(BENCH)

build: ## The command `forebay`, optimised, at target/release/forebay
	cargo build --release --package forebay

test: deps ## All tests: unit, property, integration with real servers and real mounts
	$(SERVERS); cargo test --workspace

lint: ## Format and lints, as CI checks them
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- --deny warnings

generate: ## What is generated from the code: crds/, docs/api.md, docs/metrics.md
	scripts/generate.sh

fuzz: ## Every decoder of bytes from outside, SECONDS_EACH=60
	scripts/fuzz.sh $${SECONDS_EACH:-60}

e2e: ## The tests on a real Kubernetes: one that is built and started here, or that of KUBECONFIG. TESTS=words chooses
	e2e/run.sh $(TESTS)

cluster: ## A Kubernetes of two nodes on this machine with Forebay and the quickstart in it, to play with
	e2e/play.sh

cluster-down: ## Removes it
	e2e/cluster.sh down

nightly: deps ## The long forms: 1,000 kills, five minutes of fuzzing for each decoder, 20 rounds of unkillable pods
	$(SERVERS); FOREBAY_LONG=1 cargo test --workspace
	FOREBAY_LONG=1 e2e/run.sh
	scripts/fuzz.sh 300

deps: ## What the tests need from the system's packages
	@scripts/deps.sh

clean: ## Everything that was built
	@if [ -d target/e2e/cluster ]; then e2e/cluster.sh down; fi
	cargo clean
