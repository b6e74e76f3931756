"""What users give: arguments, paths and code of theirs."""
