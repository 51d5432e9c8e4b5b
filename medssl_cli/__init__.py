"""Self-supervised learning on medical images: DICOM in, numbers with confidence intervals out."""
