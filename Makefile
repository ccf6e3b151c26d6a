# make demo: train on synthetic scans, predict, draw.   make test: the tests and the linter.   make clean
# make docs: the pictures of the README, of synthetic scans, too
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
SCAN := cache/phantom/imagesTr/la_000.nii.gz
TRUTH := cache/phantom/labelsTr/la_000.nii.gz

.PHONY: demo docs test clean

demo: .venv/installed
	$(BIN)/python train.py --data phantom --width 8 --out $(RUN) --resume
	$(BIN)/python predict.py cache/phantom --checkpoint $(RUN)/last.pt --out $(RUN)/masks --labels cache/phantom/labelsTr --held-out
	$(BIN)/python visualize.py overlay $(SCAN) $(RUN)/masks/la_000.nii.gz $(TRUTH) --out $(RUN)/overlay.png
	$(BIN)/python visualize.py movie $(SCAN) $(RUN)/masks/la_000.nii.gz $(TRUTH) --out $(RUN)/movie.gif
	$(BIN)/python visualize.py movie $(SCAN) $(RUN)/masks/la_000.nii.gz $(TRUTH) --out $(RUN)/movie.html
	$(BIN)/python visualize.py augment $(SCAN) $(TRUTH) --out $(RUN)/augment.png
	@echo "Pictures: $(RUN)/overlay.png movie.gif movie.html augment.png validation.png worst.png curves.png"
	@echo "Masks: $(RUN)/masks"

# A run of its own: with attention gates, so that layers.png shows them.
docs: .venv/installed
	$(BIN)/python train.py --data phantom --width 8 --epochs 14 --attention --out runs/docs --resume
	$(BIN)/python predict.py cache/phantom --checkpoint runs/docs/last.pt --out runs/docs/masks --labels cache/phantom/labelsTr --held-out
	$(BIN)/python visualize.py movie $(SCAN) runs/docs/masks/la_000.nii.gz $(TRUTH) --out docs/movie.gif
	$(BIN)/python visualize.py surface $(SCAN) runs/docs/masks/la_000.nii.gz $(TRUTH) --out docs/surface.png
	$(BIN)/python visualize.py layers runs/docs/last.pt $(SCAN) --out docs/layers.png
	cp runs/docs/validation.png docs/validation.png
	$(BIN)/pip install --quiet lightning
	$(BIN)/python train.py --data phantom --width 8 --epochs 4 --engine both --precision fp32 --out runs/both
	cp runs/both/engines.png docs/engines.png
	cp runs/both/engines.txt docs/engines.txt

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
