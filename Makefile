# make demo: train on synthetic scans, predict, draw.   make test: the linter and the tests.   make clean
# make docs: the pictures of the README.   make tour: tour.ipynb from tour.py
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
SCAN := phantom/imagesTr/la_000.nii.gz
TRUTH := phantom/labelsTr/la_000.nii.gz

.PHONY: demo docs tour test clean

demo: .venv/installed
	$(BIN)/python phantom.py phantom --scans 15
	$(BIN)/python train.py --data phantom --width 8 --batch-size 4 --steps 84 --epochs 12 --out $(RUN) --resume
	$(BIN)/python predict.py phantom --checkpoint $(RUN)/last.pt --out $(RUN)/masks --labels phantom/labelsTr --held-out
	$(BIN)/python visualize.py overlay $(SCAN) $(RUN)/masks/la_000.nii.gz $(TRUTH) --out $(RUN)/overlay.png
	$(BIN)/python visualize.py movie $(SCAN) $(RUN)/masks/la_000.nii.gz $(TRUTH) --out $(RUN)/movie.gif
	$(BIN)/python visualize.py movie $(SCAN) $(RUN)/masks/la_000.nii.gz $(TRUTH) --out $(RUN)/movie.html
	$(BIN)/python visualize.py augment $(SCAN) $(TRUTH) --out $(RUN)/augment.png
	@echo "Masks: $(RUN)/masks"
	@echo "Pictures in $(RUN): overlay.png movie.gif movie.html augment.png validation.png curves.png"

docs: demo
	$(BIN)/python visualize.py layers $(RUN)/last.pt $(SCAN) --out docs/layers.png
	cp $(RUN)/movie.gif docs/movie.gif

tour: .venv/installed-dev
	rm -rf runs/tour
	$(BIN)/jupytext --quiet --to ipynb --output tour.ipynb tour.py
	$(BIN)/jupyter execute --inplace tour.ipynb

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

# A PyTorch that already lies in .venv (a CPU build, say) is kept.
.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# Runs, logs and masks of your own stay.
clean:
	rm -rf $(RUN) runs/tour cache phantom
