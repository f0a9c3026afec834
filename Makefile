# make demo   install, make phantoms, train a small network, segment unseen ones, draw one in 3D
# make test   install and run all tests
# make mutations   break the product on purpose, line by line: does a test notice? (minutes)
# make reliability   test with bad files, kills, full disks, two processes at once (hours; --quick: minutes)
# make peers   train nnU-Net and MONAI's tutorial in the same CPU minutes (hours)
# make gpu   check and measure a GPU, at most ten minutes (docs/evidence/scale.md)
# make starter   train the starter weights from seeds and evaluate them (docs/evidence/starter.md)
PYTHON ?= python3
BIN := .venv/bin
DEMO := data/demo

.PHONY: demo gpu starter peers test mutations lint pictures reliability system-packages

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

# The five steps, made small by options alone: 44 s on two cores after the installation, 21 of them in
# training. Training starts from the starter weights, which have seen other synthetic CTs.
PATCHES := --sampling patches --spacing 3 3 3 --input-size 80 80 48
demo: .venv/installed
	rm -rf $(DEMO)
	$(BIN)/python data/make_phantoms.py --destination $(DEMO)/raw --cases 24 --size 96
	$(BIN)/python prepare.py $(DEMO)/raw --destination $(DEMO)/prepared --subvolume-depth 0
	$(BIN)/python preprocess.py --data $(DEMO)/prepared $(PATCHES)
	$(BIN)/python train.py --data $(DEMO)/prepared --run-folder $(DEMO)/run $(PATCHES) \
		--pretrained checkpoints/starter.pt --network unet --base-channels 16 --loss dice_ce \
		--learning-rate 1e-3 --patches-per-case 2 --max-epochs 4 --val-interval 2
	$(BIN)/python apply_model.py --split test --data $(DEMO)/prepared \
		--checkpoint $(DEMO)/run/best.pt --destination $(DEMO)/results
	$(BIN)/python visualize_3d.py $$(ls -d $(DEMO)/results/*/ | head -n 1) --mode organs \
		--screenshot $(DEMO)/liver_3d.png
	@echo "done: open $(DEMO)/results/summary.png and $(DEMO)/liver_3d.png"
	@echo "next: source .venv/bin/activate    # then the commands of README.md run as they stand"

# Weights trained on synthetic CTs of 4, 3 and 2 mm, on slabs, on tumours; about six hours.
starter: .venv/installed
	$(BIN)/python benchmarks/starter.py

# nnU-Net has its own environment, because its versions differ from ours.
.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet nnunetv2==2.8.1 torch==2.14.1
	touch $@

peers: .venv/installed .venv-peers/installed
	$(BIN)/python benchmarks/peers.py

gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

# One torch thread per test process: two processes fill two cores without fighting.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# tests/mutations.py lists them, each with the test that must fail.
mutations: .venv/installed
	$(BIN)/python tests/mutations.py --workers 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the test with a real window needs; without it it skips and says so.
system-packages:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends xvfb xdotool > /dev/null

# The README's pictures, from what the demo left.
pictures:
	$(BIN)/python benchmarks/pictures.py

# Test every promise of the README with bad files, kills and full disks: benchmarks/results/reliability.json.
reliability: .venv/installed
	$(BIN)/python benchmarks/reliability.py
