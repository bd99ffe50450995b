#!/usr/bin/env node
// Compiles src/ with the pinned solc and writes one artifact per contract. Deterministic: the same sources, compiler and
// OpenZeppelin give the same bytes on any machine, which tests/unit/test_contracts_artifacts.py checks.
//   node compile.cjs [OUT_DIR]      OUT_DIR defaults to the committed gpumarket/contracts/artifacts
'use strict'
const crypto = require('node:crypto')
const fs = require('node:fs')
const path = require('node:path')
const solc = require('solc')

const ROOT = __dirname
const CONTRACTS = ['Disputes', 'MarketToken', 'PaymentChannels', 'StakeRegistry']
const SETTINGS = {
  optimizer: { enabled: true, runs: 200 },
  viaIR: true, // measured: a push of 100 costs 16,070 gas each, 16,360 without; Disputes fits the code size limit with it only
  evmVersion: 'cancun',
  // No metadata in the bytecode: the code hash then names behaviour, and a changed comment does not change it.
  metadata: { appendCBOR: false, bytecodeHash: 'none' },
  outputSelection: {
    '*': {
      '*': [
        'abi',
        'evm.bytecode.object',
        'evm.deployedBytecode.object',
        'evm.deployedBytecode.immutableReferences',
        'storageLayout',
      ],
    },
  },
}

// OpenZeppelin's transient reentrancy guard clears its slot at the end of each call, as this warning asks for.
const TRANSIENT_STORAGE = '2394'

function readImport(file) {
  try {
    return { contents: fs.readFileSync(file, 'utf8') }
  } catch (error) {
    return { error: `${error.message}; run make contracts` }
  }
}

// Each contract is compiled by itself, with what it imports: another contract's source then never changes its code or its hash.
function compile(name) {
  const file = `src/${name}.sol`
  const content = fs.readFileSync(path.join(ROOT, file), 'utf8')
  const read = { [file]: content }
  const load = (wanted) => {
    const found = readImport(path.join(ROOT, wanted.startsWith('src/') ? '' : 'node_modules', wanted))
    if (found.contents !== undefined) read[wanted] = found.contents
    return found
  }
  const input = { language: 'Solidity', sources: { [file]: { content } }, settings: SETTINGS }
  const output = JSON.parse(solc.compile(JSON.stringify(input), { import: load }))
  const problems = (output.errors || []).filter((item) => item.errorCode !== TRANSIENT_STORAGE)
  for (const item of problems) process.stderr.write(item.formattedMessage)
  if (problems.length > 0) process.exit(1) // warnings too: this code cannot be patched later
  return artifact(name, output.contracts[file][name], sourceHash(read))
}

function sourceHash(read) {
  const hash = crypto.createHash('sha256')
  for (const name of Object.keys(read).sort()) {
    hash.update(`${name}\0${crypto.createHash('sha256').update(read[name]).digest('hex')}\n`)
  }
  return hash.digest('hex')
}

function storage(layout) {
  const named = ({ label, slot, offset, type }) => ({ label, slot, offset, type: layout.types[type].label })
  const structs = Object.values(layout.types || {}).filter((type) => type.members)
  return {
    variables: layout.storage.map(named),
    structs: Object.fromEntries(structs.map((type) => [type.label.replace('struct ', ''), type.members.map(named)])),
  }
}

function artifact(name, compiled, hash) {
  const code = compiled.evm.deployedBytecode
  return {
    name,
    compiler: solc.version().replace(/\.Emscripten.*$/, ''),
    sourceHash: hash,
    abi: compiled.abi,
    bytecode: '0x' + compiled.evm.bytecode.object,
    deployedBytecode: '0x' + code.object,
    // Byte ranges of the runtime code that the constructor fills in; a comparison masks them.
    immutableReferences: Object.values(code.immutableReferences || {})
      .flat()
      .sort((a, b) => a.start - b.start),
    storageLayout: storage(compiled.storageLayout),
  }
}

function main() {
  const out = path.resolve(process.argv[2] || path.join(ROOT, 'gpumarket', 'contracts', 'artifacts'))
  fs.mkdirSync(out, { recursive: true })
  for (const name of CONTRACTS) {
    const made = compile(name)
    fs.writeFileSync(path.join(out, `${name}.json`), JSON.stringify(made, null, 1) + '\n')
    process.stdout.write(`${name}: ${(made.deployedBytecode.length - 2) / 2} bytes\n`)
  }
}

main()
