"""Distil a graph network into a perceptron that needs no graph when it is used (GLNN).

The recipe is a plain mapping, as a YAML recipe is. Your graph: {"name": "planetoid:Cora"} or {"name": "cpf:cora"}
under the folder that STILLHOUSE_DATA names. Needs: pip install 'stillhouse[graph]'.
"""

import stillhouse

recipe = {
    "method": "glnn",
    "data": {"name": "synthetic"},  # a random graph of three communities
    "teacher": {"conv": "gcn", "layers": 2, "width": 64},
    "student": {"layers": 2, "width": 64},
    "train": {"epochs": 200},
}

distilled = stillhouse.run_recipe(recipe, "runs/graph", overwrite=True)
alone = stillhouse.run_recipe({**recipe, "lamb": 1}, "runs/graph-alone", overwrite=True)  # labels only
student = stillhouse.load("runs/graph")

print(f"accuracy: perceptron alone {alone['accuracy']:.3f}, distilled {distilled['accuracy']:.3f}")
