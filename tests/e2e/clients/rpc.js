// SPDX-License-Identifier: LGPL-2.1-or-later

// The npm package jayson as it comes, on a Unix socket; and rpc.discover against OpenRPC's meta-schema.
const jayson = require('jayson');
const Ajv = require('ajv');
const meta = require('@open-rpc/meta-schema').default;

const client = jayson.Client.tcp({path: process.argv[2]});
const call = (method, params) => new Promise((resolve, reject) => {
  client.request(method, params, (error, response) => error ? reject(error) : resolve(response));
});

(async () => {
  const secret = {'qom-type': 'secret', id: 'js', data: 'letmein'};
  console.log('added', JSON.stringify((await call('object-add', secret)).result));
  const refused = (await call('object-add', secret)).error;
  console.log('error', refused.code, refused.message, refused.data.class);
  console.log('listed', (await call('query-secrets', {})).result.map((each) => each.id).join());
  const batch = [
    client.request('query-name', {}, undefined, false),
    client.request('object-del', {id: 'js'}, undefined, false),
    client.request('object-del', {id: 'nope'}, undefined, false),
  ];
  client.request(batch, (error, responses) => {
    if (error) throw error;
    console.log('batch', responses.map((each) => each.error ? each.error.code : 'ok').join());
    call('rpc.discover', {}).then(({result}) => {
      const ajv = new Ajv({schemaId: 'auto', unknownFormats: 'ignore', logger: false});
      // Ajv takes an id with a final slash for another one than that without.
      const named = ({$schema, ...schema}) => JSON.parse(JSON.stringify(schema).replaceAll(
        /https:\/\/meta.json-schema.tools\/?(?=["#])/g, 'https://meta.json-schema.tools/schema'));
      ajv.addSchema(named(require('@json-schema-tools/meta-schema').default));
      const valid = ajv.validate(named(meta), result);
      console.log('openrpc', valid, valid ? '' : JSON.stringify(ajv.errors.slice(0, 3)));
      console.log('methods', result.methods.length > 20);
    });
  });
})().catch((error) => { console.error(error); process.exit(1); });
