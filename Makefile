# make run: the whole curriculum, tiny. make test: the tests. Both install what they need into .venv first.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
EXPERIMENT ?= tiny
# TORCH=cpu takes torch without CUDA: 0.6 GB of downloads instead of 3.2 GB.
TORCH ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -c constraints.txt

LONG ?= long
# MINUTES of `make chaos` on a disk, and as many on S3; each call adds to tests/chaos/results.jsonl.
MINUTES ?= 30

.PHONY: install run test long chaos coverage check audit sbom format bench pictures

install: .venv/installed

# editable_mode=compat: a path that type checkers and editors follow.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: install one, or name it with make PYTHON=…"; exit 1; }
	$(PYTHON) -m venv .venv
	$(if $(filter cpu,$(TORCH)),$(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu torch)
	$(PIP) -e '.[dev]' --config-settings editable_mode=compat
	@touch $@

run: install
	$(BIN)/vectorclm run $(EXPERIMENT)

test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Every cell of which `make test` runs one: hours. A second call goes on; the results are in $(LONG).
SLOW := tests/store/test_publication.py tests/store/test_durable.py tests/store/test_storage.py tests/shards/test_block_readers.py \
	tests/runtime/test_preemption.py tests/runtime/test_nodes.py tests/platform/test_database.py tests/platform/test_platform.py \
	tests/platform/test_backup.py tests/platform/test_upgrade.py tests/platform/test_walks.py tests/evaluation/test_code_judge.py tests/bench/test_orchestration.py tests/bench/test_tracking.py \
	tests/platform/test_provision.py tests/platform/test_guard.py tests/lineage/test_chain.py tests/lineage/test_mlflow_walk.py tests/store/test_listing.py \
	tests/runtime/test_world_sizes.py tests/runtime/test_distributed.py tests/shards/test_node_blocks.py tests/bench/test_training.py tests/planner/test_step.py tests/execution/engines/test_ray_cluster.py tests/execution/engines/test_srun.py tests/inference/test_clients.py tests/export/test_consumers.py tests/test_library.py tests/test_install.py tests/formats/test_hostile.py tests/formats/test_data_files.py tests/formats/test_model_files.py tests/formats/test_store_files.py tests/chaos/test_campaign.py
long: install
	@mkdir -p $(LONG)
	@for file in $(SLOW); do \
		result=$(LONG)/$$(basename $$file .py).txt; \
		if grep -qs "^passed" $$result; then echo "$$file: done, see $$result"; continue; fi; \
		VECTORCLM_KILLS=40 VECTORCLM_MATRIX=full VECTORCLM_HUMANEVAL=all VECTORCLM_CLIENTS=all VECTORCLM_FUZZ=120000 $(BIN)/python -m pytest -v $$file > $$result.part 2>&1 \
			&& { mv $$result.part $$result; echo "passed" >> $$result; echo "$$file: passed"; } \
			|| { tail -n 20 $$result.part; exit 1; }; \
	done
	@$(MAKE) chaos

chaos: install # `vectorclm chaos` on a disk and on a real S3 server; a second call goes on with further trials
	$(BIN)/python -m tests.chaos.runs 1 $(MINUTES)

coverage: install # the share of each module's lines of flows that the test of its name runs
	$(BIN)/python -m tests.module_coverage

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_layout.py

audit: # known advisories of the pinned versions; a version that no list answers for fails, too
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'
	.venv-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --desc

# The packages of .venv with their versions and licences, as CycloneDX; the writer has an environment of its own.
sbom: install
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check 'cyclonedx-bom>=7.2,<8'
	.venv-audit/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --of JSON -o sbom.json $(BIN)/python

pictures: install # those of the pages, taken anew from a real run in a real browser: minutes
	$(BIN)/python -m tests.pictures
	$(BIN)/python -m tests.recording

bench: install # each a ratio to a peer measured in the same run
	$(BIN)/vectorclm bench train
	$(BIN)/vectorclm bench generate
	$(BIN)/vectorclm bench evaluate
	$(BIN)/vectorclm bench data

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
