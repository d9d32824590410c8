"""What a run needs beside its method: mesh, processes, checkpoints, compiled steps, optimizer, metrics."""
