"""Learn twenty images, two of each digit, on which a network trains almost as well as on many (distribution matching).

Your images: {"name": "imagefolder:PATH", "image_size": 32, "augment": "plain"}.
"""

import stillhouse

recipe = {
    "method": "dm",
    "data": {"name": "digits", "augment": "plain"},
    "network": {"model": "stillhouse:convnet2", "options": {"width": 16}},
    "ipc": 2,  # images per class
    "augment": {"groups": "crop_scale_rotate"},  # digits must not be mirrored
    "iterations": 80,
    "batch_real": 64,
    "lr": 1.0,
    "evaluate": {"networks": 1, "epochs": 60},
}

learned = stillhouse.run_recipe(recipe, "runs/small", overwrite=True)
random = stillhouse.run_recipe({**recipe, "iterations": 0}, "runs/random", overwrite=True)  # real images
images = stillhouse.load("runs/small").images

print(f"accuracy: random images {random['accuracy']:.3f}, learned images {learned['accuracy']:.3f}")
print(f"images: {tuple(images.shape)}; look at runs/small/product/sheet.png")
