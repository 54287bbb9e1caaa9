# make demo: the whole chain on a small zoo.  make test: the test suite.  Both set up .venv first, if there is need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# No network but package indexes is needed; OpenMP threads spin, so several actors get one each.
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1
export RAY_USAGE_STATS_ENABLED := 0
# Where it is set, every process of Ray and of pytest would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test unit study study-report soak docs lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements/cpu.lock requirements/install.sh pyproject.toml
	@bash requirements/install.sh $(PYTHON) $(VENV)

demo: setup
	@$(BIN)/simmerge demo runs/demo

test: setup
	@$(BIN)/python -m pytest tests -n 2 --dist worksteal

unit: setup
	@$(BIN)/python -m pytest tests/unit tests/peer -n 2 -m "not slow"

# The study of docs/study-plan.md: hours on two cores; the same command goes on where it stopped.
study: setup
	@$(BIN)/python jobs/study.py --out runs/study

# Every number of the studies' pages that their published labels and signals give, computed again: exit code 2 and a line
# for each that a page has otherwise. Kept in build/study-report until the data or the code changes.
study-report: setup
	@$(BIN)/python jobs/study_report.py

# Campaigns that take long and are not part of the tests: kills in every stage, drivers, actors and nodes killed in
# a search, the service killed under load. Figures: benchmarks/README.md
soak: setup
	@SIMMERGE_FUZZ_FILES=20000 $(BIN)/python -m pytest -q tests/fuzz/test_files.py
	@$(BIN)/python -m benchmarks.soak demo
	@$(BIN)/simmerge demo runs/demo
	@$(BIN)/python -m benchmarks.search.soak_search --run runs/demo --out runs/soak
	@$(BIN)/python -m benchmarks.service.soak sqlite --run runs/demo
	@$(BIN)/python -m benchmarks.service.soak postgresql --run runs/demo
	@$(BIN)/python -m benchmarks.service.serve_soak sqlite --run runs/demo

# The pages of docs/, README and a reference made from the code, as a site in build/site; a broken link fails. Its tools
# are the extra `docs`, which the locked set leaves out: they are installed when they are missing.
DOCS_TOOLS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
docs: setup
	@test -x $(BIN)/mkdocs || $(BIN)/python -m pip install --quiet $$($(BIN)/python -c '$(DOCS_TOOLS)')
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "open build/site/index.html"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist *.egg-info
