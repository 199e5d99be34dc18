"""Where rows come from: files of any kind, folders, the packaged dataset, the hub."""
