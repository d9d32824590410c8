"""What a run needs beside the method: mesh, processes, checkpoints, compiled steps, optimizer, metrics."""
