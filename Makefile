# Two commands do everything on a machine with Rust: `make demo` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: help demo build test lint generate fuzz nightly deps clean

help: ## This list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: deps ## Serve a data set from an embedded S3 store through workers and a FUSE mount; kill things; print a table
	cargo build --release --package forebay --package forebay-demo
	./target/release/forebay-demo --forebay ./target/release/forebay

build: ## The command `forebay`, optimised, at target/release/forebay
	cargo build --release --package forebay

test: deps ## All tests: unit, property, integration with real servers and real mounts
	FOREBAY_VERSITYGW="$$(scripts/versitygw.sh)" cargo test --workspace

lint: ## Format and lints, as CI checks them
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- --deny warnings

generate: ## What is generated from the code: crds/, docs/api.md, docs/metrics.md
	scripts/generate.sh

fuzz: ## Every decoder of bytes from outside, SECONDS_EACH=60
	scripts/fuzz.sh $${SECONDS_EACH:-60}

nightly: deps ## The long forms: 1,000 kills, five minutes of fuzzing for each decoder
	FOREBAY_LONG=1 FOREBAY_VERSITYGW="$$(scripts/versitygw.sh)" cargo test --workspace
	scripts/fuzz.sh 300

deps: ## What the tests need from the system's packages
	@scripts/deps.sh

clean: ## Everything that was built
	cargo clean
