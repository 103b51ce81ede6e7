"""Faces of other packages over `Llama`, so that programs written for them move by an import."""
