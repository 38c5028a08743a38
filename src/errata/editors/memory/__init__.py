"""Methods that leave the weights alone and keep their edits in a memory beside them."""
