# `make demo` and `make test` need `python3` (3.10 or newer), make and bash, and install the rest
# under .venv. Further arguments of pip: PIP_FLAGS="--proxy ...".
SHELL := bash
PYTHON ?= python3

.PHONY: demo test clean

demo:
	@tools/venv.sh demo "$(PYTHON)" demo
	@.venv/demo/bin/r3patch demo

test:
	@tools/test.sh

clean:
	rm -rf .venv
