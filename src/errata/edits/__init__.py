"""What a change is: apply, undo, stack, compare, save and export."""
