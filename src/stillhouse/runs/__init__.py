"""Running recipes: `Method`, `Run`, stages, products, execution, comparisons over seeds, export."""
