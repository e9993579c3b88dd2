"""Its being here puts this folder on the import path: tests share modules such as `families`."""
