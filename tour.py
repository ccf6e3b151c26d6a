# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Find the left atrium: the course in one notebook
#
# The left atrium is one of the four chambers of the heart. Doctors want to know its size and its shape. So somebody has
# to mark it in a scan, slice by slice. By hand that is slow work. A network can learn to do it in seconds.
#
# In this notebook you look at scans. You see what a network is made of. You train one, and you watch it learn. It all
# runs on a laptop in about four minutes, and it needs no data: we make synthetic scans.
#
# Read the text, run the cell, look at the picture. A question stands before each picture. Try to answer it first.

# %% [markdown]
# ## 0. Get ready
#
# At home this cell only imports the files of the project. On Colab it fetches them first: write the address of your
# copy of the project into `REPOSITORY`.

# %%
import inspect
import os
import subprocess
import sys

if not os.path.exists("unet.py"):
    REPOSITORY = "https://github.com/OWNER/NAME"  # put the address of your copy here
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "course"])
    os.chdir("course")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"], check=True)

import numpy as np
import torch
from IPython.display import Image, Markdown, display
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import losses
import phantom
import predict
import train
import unet
import visualize

visualize.WIDTH = 600  # pixels of a picture: small, so that this page stays small
# With TOUR_QUICK=1 all is smaller and shorter: so the tests run this notebook.
SCANS, SIZE, EPOCHS, STEPS = (5, 0.5, 1, 8) if os.environ.get("TOUR_QUICK") else (15, 1, 7, 42)

# %% [markdown]
# ## 1. Look at a scan
#
# A scan is a stack of slices. Each slice is a table of numbers. Each number is the brightness of one *voxel*, a small
# brick of tissue. The *mask* has one number for each voxel, too: 1 is left atrium, 0 is anything else.
#
# Our scans come from `phantom.py`. They are drawings of a chest, with the noise of a scanner. A score on them says
# nothing about patients. But all that follows works on real scans in the same way.
#
# **Question. The blood is equally bright in all four chambers. How do you find the left atrium?**

# %%
folder = phantom.write_dataset("runs/tour/phantom", scans=SCANS, size=SIZE)
pairs = data.find_pairs(folder)
scan = data.read_scan(pairs[0].image)
truth = data.read_mask(pairs[0].label, scan)
print("slices, rows, columns:", truth.shape, " a voxel in mm:", scan.spacing, f" left atrium: {truth.mean():.1%}")
visualize.planes(scan.array, [truth], scan.spacing)

# %% [markdown]
# **What to see.** Brightness does not help you. Place and shape do: the left atrium lies at the back of the heart,
# close to the spine, and veins run into it from both sides. Only one or two voxels in a hundred belong to it. And look
# at the two pictures from the front and from the side. Their voxels are longer than wide, because a slice is thick.

# %% [markdown]
# ## 2. Make all scans alike
#
# Each scanner has its own scale of brightness and its own size of image. A network learns faster when scans look alike.
# So `data.preprocess` cuts off the few darkest and brightest values. Then it shifts and stretches the rest: the mean
# becomes 0, the deviation becomes 1. Training and prediction both call it. If they did not, the network would meet
# scans that it cannot read. (For training, all slices are then cropped or padded to one size, as in these pictures.)
#
# **Question. Four patients: first as the scanner stores them, then as the network sees them. What is the same now?**

# %%
args = train.parse_args(["--data", str(folder), "--cache", "runs/tour/cache", "--tensorboard", "runs/tour/logs",
                         "--out", "runs/tour/first", "--resume", "--epochs", str(EPOCHS),
                         "--steps", str(STEPS), "--dims", "2", "--batch-size", "8", "--workers", "0"])
train_scans, val_scans, kept = train.load_data(args)
how, split = kept["preprocess"], kept["split"]
before = [data.read_scan(pair.image) for pair in pairs[:4]]
after = [data.preprocess(one.array, one.spacing, how) for one in before]
for name, volumes in {"before": [one.array for one in before], "after": after}.items():
    numbers = (f"{round(v.mean(dtype=float))} ± {round(v.std(dtype=float))}" for v in volumes)
    print(name, "(mean ± deviation):", *numbers, sep="   ")
    middle = np.stack([data.crop_or_pad(volume[len(volume) // 2], how["size"]) for volume in volumes])
    display(visualize.overlay(np.float32(middle), [], scan.spacing))
print("train:   ", *split["train"])
print("validate:", *split["val"])

# %% [markdown]
# **What to see.** Before, one scan is dark and another is bright. After, the same tissue has the same grey in all four.
#
# The last two lines show who learns and who is asked. The network trains on some patients. It is tested on others,
# which it has never seen. We never put slices of one patient on both sides. Neighbouring slices look almost the same:
# the network could remember the answer, and the score would lie.

# %% [markdown]
# ## 3. One slice becomes many
#
# We have few patients. So in each epoch the network sees each slice a little changed: turned, stretched, bent, brighter
# or darker, noisy or blurred. The mask is turned and bent with it. This is called *augmentation*.
#
# **Question. The first picture is the slice as it is. Which of the others could be real patients?**

# %%
image, mask = (val_scans[0].open(kind) for kind in ("image", "mask"))
fullest = mask.sum(axis=(1, 2)).argmax()
image, mask = (data.crop_or_pad(array[fullest], how["size"]) for array in (image, mask))
visualize.augmented(np.float32(image), mask, data.augmenter("full"), scan.spacing[1:])

# %% [markdown]
# **What to see.** Most of them could be. Some are too crooked, and that does no harm. A network that knows these knows
# a real patient in an odd position as well. Check one more thing: the blue mask still lies on the atrium in each of
# them.

# %% [markdown]
# ## 4. The network
#
# The U-Net goes down and up again, like the letter U:
#
# ```
# slice                            answer
#   └─ level 1 ────── skip ────── level 1
#        └─ level 2 ── skip ── level 2
#             └─ level 3 ─ skip ─ level 3
#                  └──── bottom ────┘
# ```
#
# On each level down the picture shrinks to half its rows and columns, and the number of *maps* doubles. A map is the
# picture as one filter sees it. On the way down the network learns *what* is there. But it forgets *where* exactly. The
# skips bring that back: each level up gets the sharp maps of the same level down.
#
# **Question. The slice goes in at the top. How many rows are left at the bottom, and how many maps are there?**

# %%
net = unet.UNet(width=args.width, depth=args.depth, stem=args.stem)
print(f"{sum(p.numel() for p in net.parameters()):,} numbers to learn")
for name, maps in visualize.features(net, image).items():
    print("{:12}{:4} maps of {} x {}".format(name, *maps.shape))

# %% [markdown]
# **What to see.** Level 1 has half the rows of the slice already. That is the *stem*: blocks of 2 x 2 voxels go in
# together as four maps, which saves most of the time. Then three halvings follow. What comes out has the size of the
# slice again, one probability for each voxel.
#
# Inside, the answer is a *logit*: any number, above 0 for organ, below 0 for the rest. The sigmoid function makes it a
# probability between 0 and 1.

# %% [markdown]
# ## 5. The loss
#
# The network needs one number that says how wrong it is. We use the Dice score. It is twice the overlap, divided by the
# size of the one mask plus the size of the other. It is 1 for a perfect mask and 0 for a mask beside the organ. The
# *Dice loss* is 1 minus that.
#
# Take a picture of four voxels, of which the first two are organ. Three networks answer. The first is exact. The second
# finds one of the two voxels. The third says that all four are organ.
#
# **Question. Which is worse, to find only half, or to mark twice too much? Work it out in your head.**

# %%
organ = torch.tensor([1, 1, 0, 0])
for name, logits in {"exact": [99, 99, -99, -99], "half": [99, -99, -99, -99], "double": [99, 99, 99, 99]}.items():
    print(f"{name:7} Dice loss {losses.DiceLoss()(torch.tensor(logits), organ):.3f}")

# %% [markdown]
# **What to see.** They are equally bad. Half: 2 · 1 / (1 + 2) = 2/3. Double: 2 · 2 / (4 + 2) = 2/3. The loss is 1/3 for
# both. (A logit of 99 is a probability of 1, a logit of -99 is 0.)
#
# Why not count the wrong voxels? The atrium is so small that an empty mask is right in 98 of 100 voxels. Its Dice is 0.
# For training we add a second loss to this one, the *cross-entropy*. It looks at each voxel by itself, and it gives a
# useful hint even where the masks do not touch.

# %% [markdown]
# ## 6. Train
#
# Now the network learns, for about two minutes. It takes *steps*: in each it sees eight training slices, and changes
# its numbers a little, so that the loss goes down. After 42 steps, here about as many as it takes to see every slice
# once, an *epoch* ends: the network marks the scans of the validation patients, and we compare.
#
# While it runs, read its lines. They also say how much it calls organ, and how much of the voxels is.

# %%
result = train.train(args)

# %% [markdown]
# **Question. Has the network finished learning?**

# %%
visualize.curves(result["log"])

# %% [markdown]
# **What to see.** Nearly. The loss falls fast at first, and then slowly. Now look at the learning rate, the size of the
# steps. It goes up, so that the network learns fast, and then down to 0, so that it comes to rest. While it is high,
# the Dice of the validation patients may jump, even out of the picture. As it falls the Dice rises and settles, and the
# worst patient follows the mean: nobody is left behind. More patients would help now more than more epochs.

# %% [markdown]
# ## 7. Watch the mask grow
#
# After each epoch the training wrote a picture for TensorBoard. Here are some of them. The rows are the validation
# patients, each with the slice that holds most of the atrium.
#
# **Question. What does the network learn first: the place, or the shape?**

# %%
(logs,) = os.listdir("runs/tour/logs")  # of this run; others would lie beside it
events = EventAccumulator(f"runs/tour/logs/{logs}", {"images": 0}).Reload().Images("validation")
for event in events[::3]:
    print("after epoch", event.step)
    display(Image(event.encoded_image_string))

# %% [markdown]
# **What to see.** First the place, then the shape. After one epoch the network knows about where the atrium is, but
# not how large: it marks too little, or too much. Then the patch takes the form of the atrium. The border comes last,
# and the thin veins last of all. In the right column blue is correct, yellow is missed, and red is too much.

# %% [markdown]
# ## 8. What the network sees
#
# We send one slice of a validation patient through the trained network, and look at the maps of each level.
#
# **Question. Down to which level can you still recognise the heart?**

# %%
visualize.layers(predict.load_network(result), image)

# %% [markdown]
# **What to see.** On the left, going down, the maps show edges and bright areas. On level 2 you may still recognise the
# heart, on level 3 you do not. At the bottom there are only a few squares, but each of them knows a large part of the
# slice, and some of them light up where the atrium is. On the right, going up, that spot becomes sharp again with the
# help of the skips.

# %% [markdown]
# ## 9. The prediction and the truth
#
# `predict.py` takes a checkpoint and scans, and writes a mask for each. A mask has the place of its scan in space, so
# that both open together in 3D Slicer. With `--held-out` it takes only patients that the network was not trained on.
#
# **Question. Where does the network make its mistakes?**

# %%
rows = predict.predict(predict.parse_args([str(folder), "--checkpoint", "runs/tour/first/last.pt", "--held-out",
                                           "--labels", f"{folder}/labelsTr", "--out", "runs/tour/masks"]))
prediction = data.read_mask(rows[0]["mask"], scan)
visualize.overlay(scan.array, [prediction, truth], scan.spacing)

# %% [markdown]
# **What to see.** The middle of the atrium is right. The mistakes lie on the border, in the veins, and in the first and
# the last slices, where the atrium begins and ends. Two experts do not agree there either.
#
# The table has two kinds of scores. Dice and Jaccard measure the overlap. The other two are distances in mm: *assd* is
# the mean distance from border to border, and in *hd95* 95 of 100 points of the border are closer than that.

# %% [markdown]
# **Question. Does the mask fit together from slice to slice?**

# %%
frames = visualize.movie(scan.array, [prediction, truth], scan.spacing, size=240)
first, *_, last = np.flatnonzero(truth.any(axis=(1, 2)))
visualize.save_gif(frames[first : last + 1], "runs/tour/movie.gif")
Image("runs/tour/movie.gif")

# %% [markdown]
# **What to see.** The network has worked on each slice alone. It did not know the slice above or the slice below. Still
# the masks follow each other smoothly, because the patient does. (The prediction helps a little: it averages neighbours
# that lie closer than a few mm.)

# %% [markdown]
# ## 10. The loop
#
# Here is what ran in section 6, printed from `train.py`. It has four stations: train, evaluate, save, log. Find these
# four lines, the heart of all deep learning: `forward(image)`, `loss_function`, `backward`, `step`.

# %%
Markdown(f"```python\n{inspect.getsource(train.fit_loop)}```")

# %% [markdown]
# Many projects do not write the loop. They use Lightning, which runs a loop of its own and calls *hooks* of yours: one
# for a training step, one for the end of an epoch, and so on. The margin above names the hook that does the same. Here
# is the same training for Lightning. On a CPU, with `--precision fp32`, both end with the same network, to the last
# bit.

# %%
Markdown(f"```python\n{inspect.getsource(train.fit_lightning)}```")

# %% [markdown]
# ## 11. Now your own scans
#
# Put your scans into `imagesTr` and the masks, with the same names, into `labelsTr`. Or take the 20 scans of
# [Task02_Heart](http://medicaldecathlon.com). Then five commands check the data, train, score, predict and show:
#
# ```bash
# python data.py Task02_Heart
# python train.py --data Task02_Heart --out runs/heart
# python predict.py Task02_Heart --checkpoint runs/heart/last.pt --out masks/scored \
#     --labels Task02_Heart/labelsTr --held-out
# python predict.py Task02_Heart/imagesTs --checkpoint runs/heart/last.pt --out masks
# python visualize.py movie Task02_Heart/imagesTs/la_001.nii.gz masks/la_001.nii.gz --out movie.html
# ```
#
# There, voxels are about cubes, so `train.py` takes patches of the volume instead of slices: the same in 3D.
#
# Things to try here, in this notebook:
#
# - Train with `--augment none`. Is the training loss lower? Is the Dice?
# - Train with `--loss bce`. What does the network do in the first epochs?
# - Add `--attention`, and look at the maps again.
#
# Give each run its own folder with `--out`, and compare two runs: `visualize.curves(result["log"], other["log"],
# names=["first", "other"])`.
