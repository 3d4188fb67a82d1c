# `make run` distils the built-in digits, `make test` checks everything. Each works alone on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test asan clean

run: $(VENV)/built
	$(BIN)/python -m mim4dd.run $(ARGS)

test: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 14) else "requirements.txt is for Python 3.10 to 3.13; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

# Activated by PATH, so that CMake and Ninja are those of the environment.
$(VENV)/built: $(VENV)/installed setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# The compiled operator, rebuilt with AddressSanitizer, against hostile parameters.
ASAN_DIR ?= build/asan
asan: $(VENV)/built
	PATH="$(abspath $(BIN)):$$PATH" CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer -g1" MIM4DD_CUDA=0 \
		$(BIN)/python setup.py -q build_ext --build-lib $(ASAN_DIR) --build-temp $(ASAN_DIR)
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python tests/hostile.py $(ASAN_DIR)/mim4dd/_C*.so

clean:
	rm -rf $(VENV) build *.egg-info mim4dd/_C*.so
