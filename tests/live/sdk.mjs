// Drives a devbox with the published TypeScript SDK; the last line of its output is JSON for test_sdks.py.
import { Runloop } from '@runloop/api-client';

const [, , baseURL, bearerToken] = process.argv;
const client = new Runloop({ baseURL, bearerToken, maxRetries: 1 });
const told = {};

const box = await client.devboxes.createAndAwaitRunning({ name: 'from-typescript' });
told.status = box.status;
const sync = await client.devboxes.executeSync(box.id, { command: 'echo out; echo err >&2; exit 7' });
told.sync = [sync.stdout, sync.stderr, sync.exit_status];
const awaited = await client.devboxes.executeAndAwaitCompletion(box.id, { command: 'sleep 0.2; echo awaited' });
told.awaited = [awaited.stdout, awaited.exit_status];
const begun = await client.devboxes.executeAsync(box.id, { command: 'for i in 1 2 3; do echo $i; sleep 0.05; done' });
told.streamed = '';
for await (const part of await client.devboxes.executions.streamStdoutUpdates(box.id, begun.execution_id, {})) {
  told.streamed += part.output;
}
told.name = (await client.devboxes.update(box.id, { name: 'renamed' })).name;
told.listed = false;
for await (const one of client.devboxes.list({ status: 'running' })) {
  if (one.id === box.id) told.listed = true;
}
await client.devboxes.writeFileContents(box.id, { file_path: '~/a/b.txt', contents: 'grüße\n' });
told.read = await client.devboxes.readFileContents(box.id, { file_path: 'a/b.txt' });
const bytes = new Uint8Array(300000).map((_, at) => at % 251);
await client.devboxes.uploadFile(box.id, { path: 'c.bin', file: new File([bytes], 'c.bin') });
const down = await client.devboxes.downloadFile(box.id, { path: 'c.bin' });
told.same = Buffer.compare(Buffer.from(await down.arrayBuffer()), Buffer.from(bytes)) === 0;
await client.devboxes.keepAlive(box.id);
told.after = (await client.devboxes.shutdown(box.id)).status;
try {
  await client.devboxes.retrieve('dbx_' + '0'.repeat(26));
} catch (error) {
  told.unknown = error.status;
}
console.log(JSON.stringify(told));
