# Each target does its own set-up. `make help` lists them.

LAB := cargo run -p bulkhead-lab --

export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: help setup demo check bench lab fmt install

help:
	@echo "make demo    build, start a VM, drive it over QMP, show its processes"
	@echo "make check   all tests; ends with the line \"N passed, N failed\""
	@echo "make bench   the product's figures beside their references; FIGURES=\"start qmp\" chooses"
	@echo "make lab     only the cases that boot Debian in the lab"
	@echo "make fmt     format the sources"
	@echo "make install  install binaries and systemd units; DESTDIR= goes before each path"
	@echo "make setup   install the Debian packages that the others need"

setup:
	@tests/setup.sh

demo: setup
	@$(LAB) demo

check: setup
	@tests/check.sh

bench: setup
	@$(LAB) build
	@cargo run --release -p bulkhead-bench -- $(FIGURES)

lab: setup
	@$(LAB) run

install:
	@cargo build --release --locked
	@jail-profiles/install.sh

fmt:
	@cargo fmt --all
