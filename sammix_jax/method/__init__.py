"""The method as functions of arrays: from HU slices to the loss, all within one jitted step."""
