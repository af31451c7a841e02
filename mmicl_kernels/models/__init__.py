"""What a HuggingFace model is: its family, where its parts are (anchors), its tokens."""
