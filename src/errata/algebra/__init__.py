"""Pure maths: tensors in, tensors out; imports torch only."""
