"""Reports as HTML: one template and one plot helper for all of them."""
