// SPDX-License-Identifier: LGPL-2.1-or-later

// A client with the npm package qemu-qmp as it comes: each step prints a line for the test to compare.
const QMP = require('qemu-qmp');

const qmp = new QMP();
const fail = (error) => { if (error) { console.error(error); process.exit(1); } };

qmp.on('secret_added', (name) => {
  console.log('event', name);
  qmp.execute('object-del', {id: 'js'}, (error) => {
    fail(error);
    console.log('deleted');
    qmp.end();
  });
});

qmp.connect(process.argv[2], (error) => {
  fail(error);
  console.log('version', qmp.version.qemu.major);
  qmp.execute('query-commands', (error, commands) => {
    fail(error);
    for (const command of commands) console.log('command', command.name);
    const secret = {'qom-type': 'secret', id: 'js', data: 'letmein'};
    qmp.execute('object-add', secret, (error) => {
      fail(error);
      qmp.execute('object-add', secret, (error) => {
        console.log('error', error.message);
        qmp.execute('secret-events', {enable: true}, (error) => {
          fail(error);
          console.log('added');
        });
      });
    });
  });
});
