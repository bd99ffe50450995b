// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {Disputes} from "../src/Disputes.sol";
import {MarketToken} from "../src/MarketToken.sol";
import {StakeRegistry} from "../src/StakeRegistry.sol";
import {Terms} from "../src/disputes/DisputeTerms.sol";
import {Claim, Dispute} from "../src/disputes/DisputeTypes.sol";
import {IStakeRegistry} from "../src/disputes/IStakeRegistry.sol";
import {JobSpec, Lease, Profile, Receipt, Statements} from "../src/disputes/Statements.sol";
import {Base} from "./Base.sol";

interface VmBlocks {
    function roll(uint256 number) external;
}

/// Hashes of statements in memory: the library takes calldata, as the contract gets them.
contract Hasher {
    function lease(Lease calldata value) external pure returns (bytes32) {
        return Statements.hash(value);
    }

    function spec(JobSpec calldata value) external pure returns (bytes32) {
        return Statements.hash(value);
    }

    function receipt(Receipt calldata value) external pure returns (bytes32) {
        return Statements.hash(value);
    }

    function profile(Profile calldata value) external pure returns (bytes32) {
        return Statements.hash(value);
    }

    function domain(address registry) external view returns (bytes32) {
        return Statements.domainSeparator(registry);
    }
}

/// A registry and disputes that name each other, a client, a scheduler, providers and verifiers. Amounts are small and odd, so that every
/// division leaves dust.
abstract contract DisputesWorld is Base {
    uint256 internal constant CLIENT = 0xC1;
    uint256 internal constant SCHEDULER = 0x5C;
    uint256 internal constant PROVIDERS = 3;
    uint256 internal constant VERIFIERS = 9;
    bytes32 internal constant MODEL = bytes32(uint256(0x4d));
    uint32 internal constant UNBONDING = 1200;
    uint64 internal constant BOUND = 150_000;

    VmBlocks internal constant blocks = VmBlocks(address(uint160(uint256(keccak256("hevm cheat code")))));

    MarketToken public token;
    StakeRegistry public registry;
    Disputes public disputes;
    Hasher internal hasher;
    uint256 internal jobs;

    function _build() internal {
        vm.chainId(31337);
        vm.warp(1_000_000);
        blocks.roll(1000);
        hasher = new Hasher();
        token = new MarketToken();
        // The next two creations of this contract are the fourth and fifth: registry and disputes know each other's address.
        address next = _created(address(this), 4);
        registry = new StakeRegistry(IERC20(address(token)), next, UNBONDING, address(0), 0, 0);
        disputes = new Disputes(IStakeRegistry(address(registry)), _terms());
        _true(address(disputes) == next, "address of disputes");
        _fund(token, vm.addr(CLIENT), address(disputes), 100);
        for (uint256 i = 0; i < PROVIDERS; ++i) {
            _node(_provider(i), 5_000);
        }
        for (uint256 i = 0; i < VERIFIERS; ++i) {
            _node(_verifier(i), 200);
            _enrol(i);
        }
        vm.warp(block.timestamp + 40);
    }

    /// Address of the n-th contract that `from` creates, n below 128 (rlp of two short items).
    function _created(address from, uint8 n) internal pure returns (address) {
        return address(uint160(uint256(keccak256(abi.encodePacked(bytes1(0xd6), bytes1(0x94), from, n)))));
    }

    function _terms() internal pure virtual returns (Terms memory t) {
        (t.seatStake, t.noShowFee, t.panelFee, t.bondMinimum, t.lockMinimum) = (50, 7, 3, 23, 101);
        (t.bondPpm, t.amountBondPpm, t.burnPpm, t.challengerPpm) = (50_000, 250_000, 500_000, 333_333);
        (t.slashMultiple, t.victimMultiple, t.slashVerifiersMin) = (15, 3, 7);
        (t.drawDelayBlocks, t.drawSeconds, t.reportSeconds, t.postSeconds) = (2, 60, 60, 60);
        (t.commitSeconds, t.revealSeconds, t.challengeSeconds) = (120, 120, 600);
        (t.epochSeconds, t.seasoningEpochs) = (10, 1);
    }

    function _provider(uint256 i) internal pure returns (uint256 key) {
        key = 0x100 + i % PROVIDERS;
    }

    function _verifier(uint256 i) internal pure returns (uint256 key) {
        key = 0x200 + i % VERIFIERS;
    }

    function _node(uint256 key, uint96 amount) internal {
        address who = vm.addr(key);
        _fund(token, who, address(registry), 1);
        vm.startPrank(who);
        registry.register(7, "12D3KooW", bytes32(uint256(1)), "");
        registry.stake(who, amount);
        vm.stopPrank();
    }

    function _enrol(uint256 i) internal {
        vm.prank(vm.addr(_verifier(i)));
        disputes.enrol(MODEL, bytes32(uint256(1)));
    }

    /// An attempt of that provider that earned `amount` base units, ready to be challenged by the client.
    function _claim(uint256 providerKey, uint96 amount) internal returns (bytes32 id, Claim memory c) {
        c.profile.task = 1;
        c.profile.grossSharePpm = uint32(BOUND);
        (c.spec.client, c.spec.scheduler, c.spec.jobId) = (vm.addr(CLIENT), vm.addr(SCHEDULER), bytes32(++jobs));
        (c.spec.task, c.spec.model, c.spec.profile) = (1, MODEL, hasher.profile(c.profile));
        (c.lease.client, c.lease.scheduler, c.lease.provider) =
            (vm.addr(CLIENT), vm.addr(SCHEDULER), vm.addr(providerKey));
        (c.lease.spec, c.lease.model, c.lease.task) = (hasher.spec(c.spec), MODEL, 1);
        (c.lease.profile, c.lease.maximum, c.lease.issuedAt) = (c.spec.profile, amount, uint64(block.timestamp));
        c.lease.deadline = c.lease.issuedAt;
        (c.lease.outputPricePerMtok, c.receipt.outputUnits) = (1_000_000, 1_000_000);
        id = hasher.lease(c.lease);
        c.receipt.lease = id;
        c.leaseSignature = _signed(SCHEDULER, id);
        c.receiptSignature = _signed(providerKey, hasher.receipt(c.receipt));
        c.nonceCommit = keccak256(abi.encode(id, vm.addr(CLIENT), _nonce(id)));
    }

    function _nonce(bytes32 id) internal pure returns (bytes32) {
        return keccak256(abi.encode("nonce", id));
    }

    function _signed(uint256 key, bytes32 statement) internal view returns (bytes memory) {
        return _signature(
            key, keccak256(abi.encodePacked(hex"1901", hasher.domain(address(registry)), statement))
        );
    }

    function _challenge(uint256 providerKey, uint96 amount) internal returns (bytes32 id) {
        Claim memory c;
        (id, c) = _claim(providerKey, amount);
        vm.prank(vm.addr(CLIENT));
        disputes.challenge(c);
    }

    function _draw(bytes32 id) internal {
        blocks.roll(disputes.dispute(id).drawBlock + 1);
        disputes.draw(id, _nonce(id));
    }

    /// All five vote; then anyone finishes.
    function _decide(bytes32 id, uint256 beyond) internal {
        _vote(id, beyond);
        disputes.finish(id);
    }

    /// All five commit and reveal; the first `beyond` of them a number beyond the profile.
    function _vote(bytes32 id, uint256 beyond) internal {
        Dispute memory d = disputes.dispute(id);
        for (uint256 i = 0; i < 5; ++i) {
            address member = d.members[i].operator;
            uint64 number = i < beyond ? BOUND + 1 : BOUND;
            bytes32 commitment = disputes.commitmentOf(id, member, number, "salt");
            vm.prank(member);
            disputes.commit(id, commitment);
        }
        for (uint256 i = 0; i < 5; ++i) {
            vm.prank(d.members[i].operator);
            disputes.reveal(id, i < beyond ? BOUND + 1 : BOUND, "salt");
        }
    }
}
