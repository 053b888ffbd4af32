// readLines(reader): yields the lines of a Deno reader, as the std module of that name does.
export async function* readLines(reader: { readable: ReadableStream<Uint8Array> }) {
  let rest = "";
  for await (const chunk of reader.readable.pipeThrough(new TextDecoderStream())) {
    const parts = (rest + chunk).split("\n");
    rest = parts.pop()!;
    yield* parts;
  }
  if (rest) yield rest;
}
