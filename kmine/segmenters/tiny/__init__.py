"""kmine's own small promptable segmenter, shipped with its weights."""
