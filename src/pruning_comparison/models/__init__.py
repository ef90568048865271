"""Loading models, and the one description per architecture of where its attention heads are kept."""

from pruning_comparison.models.heads import HeadGrid, head_grid
from pruning_comparison.models.loading import LoadedModel, ModelPreview, load_model, preview_model

__all__ = ["HeadGrid", "LoadedModel", "ModelPreview", "head_grid", "load_model", "preview_model"]
