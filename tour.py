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
# to mark it in a scan, slice by slice. That takes an hour by hand. A network can learn to do it in a second.
#
# In this notebook you look at scans, you see what a network is made of, you train one, and you watch it learn. It runs
# on a laptop in about four minutes. You need no data: we make synthetic scans.
#
# Read the text, run the cell, look at the picture. Each picture comes with a question. Try to answer it first.

# %% [markdown]
# ## 0. Get ready
#
# On your own computer this cell only imports the files of the project. On Colab it fetches them first: write the
# address of your copy of the project into `REPOSITORY`.

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

visualize.WIDTH = 640  # pixels of a picture: small, so that this page stays small
# With TOUR_QUICK=1 all is smaller and shorter: so the tests run this notebook.
SCANS, SIZE, EPOCHS = (5, 0.5, 1) if os.environ.get("TOUR_QUICK") else (10, 1, 12)

# %% [markdown]
# ## 1. Look at a scan
#
# A scan is a stack of slices. It is a box of numbers, and each number is the brightness of one *voxel*, a little brick
# of tissue. The *mask* says for each voxel whether it is left atrium: 1 is yes, 0 is no. An expert has drawn it.
#
# Our scans come from `phantom.py`. They are drawings of a chest, with noise. No score on them says anything about
# patients. But everything below works in the same way on real scans.
#
# **Question. The blood in all four chambers is equally bright. How do you know which chamber is the left atrium?**

# %%
folder = phantom.write_dataset("runs/tour/phantom", scans=SCANS, size=SIZE)
pairs = data.find_pairs(folder)
scan = data.read_scan(pairs[0].image)
truth = data.read_mask(pairs[0].label, scan)
print("voxels", truth.shape, "each of", scan.spacing, "mm; left atrium:", f"{truth.mean():.1%} of the scan")
visualize.planes(scan.array, [truth], scan.spacing)

# %% [markdown]
# **What to see.** Brightness does not tell you. Place and shape do.

# %% [markdown]
# ## 2. Make all scans alike
#
# Every scanner has its own scale of brightness, and its own size of image. A network learns faster when all scans look
# alike. So `data.preprocess` cuts off the few brightest and darkest voxels, and shifts and stretches the rest to mean 0
# and deviation 1. Then each slice is cropped or padded to one size.
#
# Training and prediction call the same function. If they did not, the network would meet scans that it has never learnt
# to read.
#
# **Question. Here are four patients, first as the scanner gives them, then as the network sees them. What has changed,
# and what has not?**

# %%
args = train.parse_args(["--data", str(folder), "--cache", "runs/tour/cache", "--tensorboard", "runs/tour/logs",
                         "--out", "runs/tour/first", "--resume", "--epochs", str(EPOCHS),
                         "--width", "16", "--batch-size", "8", "--workers", "0"])
train_scans, val_scans, split, how = train.load_data(args)
before = [data.read_scan(pair.image) for pair in pairs[:4]]
after = [data.preprocess(one.array, one.spacing, how) for one in before]
for name, volumes in {"before": [one.array for one in before], "after": after}.items():
    print(name, *(f"{np.float32(volume).mean():8.2f} ± {np.float32(volume).std():.2f}" for volume in volumes))
    middle = np.stack([data.crop_or_pad(volume[len(volume) // 2], how["size"]) for volume in volumes])
    display(visualize.overlay(np.float32(middle), [], scan.spacing))
print("to train on:", *split["train"])
print("to test on: ", *split["val"])

# %% [markdown]
# **What to see.**
#
# We also split the patients.

# %% [markdown]
# ## 3. One slice becomes many
#
# **Question. Which of these could be a real patient?**

# %%
image, mask = (val_scans[0].open(kind) for kind in ("image", "mask"))
n = mask.sum(axis=(1, 2)).argmax()
image, mask = data.crop_or_pad(image[n], how["size"]), data.crop_or_pad(mask[n], how["size"])
visualize.augmented(np.float32(image), mask, data.augmenter("full"), scan.spacing[1:])

# %% [markdown]
# **What to see.**

# %% [markdown]
# ## 4. The network
#
# **Question. How?**

# %%
net = unet.UNet(width=args.width, depth=args.depth, stem=args.stem)
print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
for name, maps in visualize.features(net, image).items():
    print("{:12} {:4} maps of {} x {}".format(name, *maps.shape))

# %% [markdown]
# ## 5. The loss

# %%
target = torch.tensor([1, 1, 0, 0])
for name, logits in {"exact": [99, 99, -99, -99], "half": [99, -99, -99, -99], "double": [99, 99, 99, 99]}.items():
    print(f"{name:7} Dice loss {losses.DiceLoss()(torch.tensor(logits), target):.3f}")

# %% [markdown]
# ## 6. Train

# %%
result = train.train(args)

# %% [markdown]
# **Question. ?**

# %%
visualize.curves(result["log"])

# %% [markdown]
# **What to see.**

# %%
events = EventAccumulator("runs/tour/logs/first", {"images": 0}).Reload().Images("validation")
for event in events[:3] + events[3::4]:
    print("after epoch", event.step)
    display(Image(event.encoded_image_string))

# %% [markdown]
# **What to see.**

# %%
visualize.layers(predict.load_network(result), image)

# %% [markdown]
# **What to see.**

# %%
rows = predict.predict(predict.parse_args([str(folder), "--checkpoint", "runs/tour/first/last.pt", "--held-out",
                                           "--labels", f"{folder}/labelsTr", "--out", "runs/tour/masks"]))
print(predict.summarise(rows))
prediction = data.read_mask(rows[0]["mask"], scan)
visualize.overlay(scan.array, [prediction, truth], scan.spacing)

# %% [markdown]
# **What to see.**

# %%
visualize.save_gif(visualize.movie(scan.array, [prediction, truth], scan.spacing), "runs/tour/movie.gif")
Image("runs/tour/movie.gif")

# %% [markdown]
# **What to see.**

# %%
Markdown(f"```python\n{inspect.getsource(train.fit_loop)}```")

# %%
Markdown(f"```python\n{inspect.getsource(train.fit_lightning)}```")
