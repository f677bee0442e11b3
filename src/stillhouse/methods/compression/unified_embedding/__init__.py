"""Unified Embedding (arXiv 2305.12102): `method.py` has the card and the procedure."""

from stillhouse.methods.compression.unified_embedding.method import Config, EmbeddingModel, UnifiedEmbeddings

__all__ = ["Config", "EmbeddingModel", "UnifiedEmbeddings"]
