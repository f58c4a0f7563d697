# Every target needs `python3` (3.10 or newer), make and bash, and installs the rest under .venv.
# Further arguments of pip: PIP_FLAGS="--proxy ...".
SHELL := bash
PYTHON ?= python3

.PHONY: demo test lint unit bench engine gpu downstream matrix clean

demo:
	@venv=$$(tools/venv.sh demo "$(PYTHON)") && $$venv/bin/r3patch demo

test: # every check, with every suitable Python
	@tools/test.sh

lint: # the checks that run nothing
	@venv=$$(tools/venv.sh dev "$(PYTHON)") && tools/lint.sh $$venv

unit: # the loop of an editor: the quick tests, of the source tree as it is now
	@venv=$$(tools/venv.sh dev "$(PYTHON)") && \
	    PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $$venv/bin/pytest -q -m "not slow and not wheel" tests/unit

bench: # all tables, by minutes; BENCH=short in a minute, which CI runs
	@venv=$$(tools/venv.sh dev "$(PYTHON)") && $$venv/bin/python -W ignore benchmarks $(BENCH)

engine: # a real vLLM against stock Megatron; with WRITE=--write its answers become the tests' data
	@tools/engine.sh "$(PYTHON)" $(WRITE)

gpu: # tests and figures of a GPU, where one is at hand, with the torch of that machine's PYTHON
	@PYTHON="$(PYTHON)" tools/gpu.sh

downstream: # the frameworks' own replay code, from the clones in CHECKOUTS, without and with r3patch
	@venv=$$(tools/venv.sh dev "$(PYTHON)") && $$venv/bin/python tools/downstream.py $(CHECKOUTS) \
	    $(if $(WRITE),--write docs/frameworks.md)

matrix: # what each release in use can break, cell by cell; with CHECKOUTS Megatron's dev, too
	@"$(PYTHON)" tools/matrix.py $(if $(CHECKOUTS),--checkouts "$(CHECKOUTS)") \
	    $(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write docs/versions.md)

clean:
	rm -rf .venv
