"""Run the teacher once, store what it outputs for five augmented views of each image, and train any number of students.

The store lies in Stillhouse's cache and is found again by every run with the same teacher, data and store options.
"""

import time

import stillhouse

recipe = {
    "data": {"name": "digits", "size": 600},  # your photographs: {"name": "imagefolder:PATH", "image_size": 64}
    "teacher": {
        "model": "stillhouse:resnet8",  # or "timm:NAME", "torchvision:NAME", "file:mine.py:Net"
        "train": {"epochs": 10, "batch_size": 64, "optimizer": {"name": "adamw", "lr": 2e-3}},
        "store": {"views": 5, "top": 5, "precision": "fp16"},
    },
    "objectives": [{"name": "ce", "weight": 0.1}, {"name": "kd", "temperature": 1.0}],
    "train": {"epochs": 20, "batch_size": 50, "optimizer": {"name": "adamw", "lr": 5e-3}},
}

for width in (16, 32):
    recipe["student"] = {"model": "stillhouse:mlp", "options": {"widths": [width]}}
    began = time.monotonic()
    figures = stillhouse.run_recipe(recipe, f"runs/stored-{width}", overwrite=True)
    print(f"accuracy: {figures['accuracy']:.3f} with {width} hidden units, {time.monotonic() - began:.0f} s in all")
