// Reads planes with zarrita for tests/test_foreign_readers.py, until stdin ends.
//
// A request is a line of JSON, {"array": folder, "at": [t, c, z, y, x]}, each of them
// an index, [start, stop], or null for all.
// The answer is a line of JSON: {"shape", "dtype", "bytes"}, followed by so many bytes of pixels in
// C order; or {"error"}. Every request opens the array anew, as a page must: zarrita keeps what it
// once read of a shard's index.

import readline from "node:readline";
import FileSystemStore from "@zarrita/storage/fs";
import * as zarr from "zarrita";

async function answer({ array, at }) {
  const opened = await zarr.open.v3(new FileSystemStore(array), { kind: "array" });
  const region = at.map((one) => (Array.isArray(one) ? zarr.slice(...one) : one));
  const { data, shape } = await zarr.get(opened, region);
  return [{ shape, dtype: opened.dtype, bytes: data.byteLength }, data];
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  try {
    const [header, pixels] = await answer(JSON.parse(line));
    process.stdout.write(`${JSON.stringify(header)}\n`);
    process.stdout.write(new Uint8Array(pixels.buffer, pixels.byteOffset, pixels.byteLength));
  } catch (error) {
    process.stdout.write(`${JSON.stringify({ error: String(error) })}\n`);
  }
}
