# make demo: train on synthetic scans, predict, draw.   make test: the tests and the linter.   make clean
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
SCAN := cache/phantom/imagesTr/la_000.nii.gz
TRUTH := cache/phantom/labelsTr/la_000.nii.gz

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/python train.py --data phantom --width 8 --epochs 14 --out $(RUN) --resume
	$(BIN)/python predict.py cache/phantom --checkpoint $(RUN)/last.pt --out $(RUN)/masks --labels cache/phantom/labelsTr --held-out
	$(BIN)/python visualize.py overlay $(SCAN) $(RUN)/masks/la_000.nii.gz $(TRUTH) --out $(RUN)/overlay.png
	$(BIN)/python visualize.py movie $(SCAN) $(RUN)/masks/la_000.nii.gz $(TRUTH) --out $(RUN)/movie.gif
	$(BIN)/python visualize.py augment $(SCAN) $(TRUTH) --out $(RUN)/augment.png
	@echo "Pictures: $(RUN)/overlay.png movie.gif augment.png validation.png curves.png; masks: $(RUN)/masks"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

# A PyTorch that already lies in .venv (a CPU build, say) is kept.
.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf runs logs cache masks
